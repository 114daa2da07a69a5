"""What a chat model is told that judges whether two texts mean the same: worked pairs, then the pair.

In a text of one's own {first} and {second} stand for the two rollouts, {prompt} for their prompt. The
answer is one word, similar or different, at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from canopy_store import store
from canopy_store.errors import DataError, StoreError

_END = """\
Prompt: {prompt}

First text: {first}

Second text: {second}

Answer with one word, similar or different.
Answer:"""

_GENERAL = """\
Two texts answer one prompt. They are similar if a reader learns the same from both: what one \
claims the other claims too, in whatever words, order or detail of wording. They are different if \
one says something of substance that the other leaves out or contradicts.

Prompt: Where does the heron of the marsh build its nest?
First text: High in the willows, out of reach of the water.
Second text: It nests up in willow trees, where floods cannot get at it.
Answer: similar

Prompt: Where does the heron of the marsh build its nest?
First text: High in the willows, out of reach of the water.
Second text: On the ground, hidden among the reeds.
Answer: different

"""
_CODING = """\
Two texts hold code for one task. They are similar if both programs do the same by the same \
approach: names, comments and layout do not count. They are different if for some input they \
return something else, or if they go about it in another way, as by a loop and by recursion.

Prompt: Write a Python function that doubles each number of a list.
First text: def twice(xs): return [2 * x for x in xs]
Second text: def double_all(numbers):
    # every number, doubled
    return [n * 2 for n in numbers]
Answer: similar

Prompt: Write a Python function that adds up the numbers from 1 to n.
First text: def total(n): return n * (n + 1) // 2
Second text: def total(n): return 0 if n == 0 else n + total(n - 1)
Answer: different

"""
_COMPLETION = """\
Two texts go on from one beginning. They are similar if the same happens, or the same is claimed, \
in both: other words for it do not count. They are different if they go on about something else, \
or if what they tell cannot both be so.

Prompt: The ferry to the island was late, so
First text: we sat down on the pier and waited until it came at noon.
Second text: we stayed on the jetty, sitting, till the boat arrived at midday.
Answer: similar

Prompt: The ferry to the island was late, so
First text: we sat down on the pier and waited until it came at noon.
Second text: my aunt sold her ticket and took the road across the hills.
Answer: different

"""
_MATH = """\
Two texts solve one problem. They are similar if they come to the same result by the same steps: \
wording and the names of quantities do not count. They are different if the results differ, or if \
they reason in another way.

Prompt: A crate holds 6 rows of 4 jars. How many jars are in 2 crates?
First text: One crate has 6 * 4 = 24 jars, so two have 48.
Second text: 6 times 4 makes 24 in a crate. Twice that is 48.
Answer: similar

Prompt: A crate holds 6 rows of 4 jars. How many jars are in 2 crates?
First text: One crate has 6 * 4 = 24 jars, so two have 48.
Second text: 6 + 4 = 10 jars a crate, 20 in both.
Answer: different

"""
_STORIES = """\
Two texts tell a story for one prompt. They are similar if plot, characters and ending are the \
same at heart: names, setting of a scene and style do not count. They are different if another \
thing happens, or if it ends otherwise.

Prompt: Write a story about a lighthouse keeper.
First text: Old Bram kept the lamp burning through the storm and so brought a lost fishing boat home.
Second text: In the worst gale of the year Mara kept the light lit; by it a trawler found the bay.
Answer: similar

Prompt: Write a story about a lighthouse keeper.
First text: Old Bram kept the lamp burning through the storm and so brought a lost fishing boat home.
Second text: The keeper left his tower for good and opened a bakery in the town below.
Answer: different

"""
PROMPTS = {
    "general": _GENERAL + _END,
    "coding": _CODING + _END,
    "completion": _COMPLETION + _END,
    "math": _MATH + _END,
    "stories": _STORIES + _END,
}
_FIELDS = re.compile(r"\{(?:prompt|first|second)\}")
_LABEL = re.compile(r"^[\W_]*(?:[\w ]{1,30}[:=])?[\W_]*(similar|different)[\W_]*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgePrompts:
    """The text for each task; ``given`` where one was named, which then is that of all."""

    given: str | None = None

    def text(self, task: str) -> str:
        """The text for a task: that given, else the task's own, else the general one."""
        return self.given if self.given is not None else PROMPTS.get(task, PROMPTS["general"])

    def of(self, task: str, prompt: str, first: str, second: str) -> str:
        """What the judge reads for a pair."""
        values = {"{prompt}": prompt, "{first}": first, "{second}": second}
        # in one go, so that braces in a rollout stay as they are
        return _FIELDS.sub(lambda found: values[found[0]], self.text(task))

    @property
    def id(self) -> str:
        """Sixteen digits that follow from the texts."""
        return store.content_id(PROMPTS if self.given is None else self.given)


def read_judge_prompts(given: str | None) -> JudgePrompts:
    """The texts of this name or file; by default each task's own.

    Raises
    ------
    DataError
        A file that lacks {first} or {second}, or is no text.
    StoreError
        A file that cannot be read.
    """
    if given is None or given in PROMPTS:
        return JudgePrompts(None if given is None else PROMPTS[given])
    try:
        text = store.read_input(Path(given)).decode()
    except StoreError as error:
        raise StoreError(f"--instruction {error}; or give {', '.join(PROMPTS)}") from None
    except UnicodeDecodeError:
        raise DataError(f"{given}: not UTF-8 text; save it as UTF-8") from None
    for field in ("{first}", "{second}"):
        if field not in text:
            raise DataError(f"--instruction {given}: has no {field}, where a rollout goes; add it")
    return JudgePrompts(text)


def verdict_of(reply: str) -> str | None:
    """similar or different, where the last line of a reply is that word alone, after a label at most.

    What stands before the end of a model's thoughts (</think>) does not count.
    """
    lines = reply.rpartition("</think>")[2].split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    found = _LABEL.match(last[:200])
    return found[1].lower() if found else None
