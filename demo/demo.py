"""The main job, whole, on two tiny models of its own: python demo/demo.py [--out DIR]

A Llama of a million parameters is trained from nothing, then fine-tuned; both are sampled on four
tasks, embedded and compared. Minutes on two cores, no download. A second run resumes.
"""

from __future__ import annotations

import os
import time

import steps


def main() -> None:
    started = time.perf_counter()
    options = steps.arguments(__doc__.splitlines()[0], "demo-output", samples=16, prompts=12)
    out = options.out
    print(f"Six steps, all in {out}; a few minutes on two cores.")
    steps.title("A model: a Llama of a million parameters, trained from nothing")
    if (out / "base" / "config.json").exists():
        print(f"{out / 'base'} is there and is used again")
    else:
        script = os.path.relpath(steps.ROOT / "demo" / "tiny_model.py")
        steps.command("python", script, "--out", out / "base")
    steps.make_child(out, "tiny", count=800, form="pairs", steps=150, learning_rate=1e-3)
    steps.ingest(out, "tiny", options)
    steps.show(out)
    took = time.perf_counter() - started
    print(f"\n{out / 'report.html'}: open it in a browser. The whole demo took {took:.0f} s.")


if __name__ == "__main__":
    main()
