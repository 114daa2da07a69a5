"""The report in a real browser: no request, every chart drawn, strangers' text inert."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from stores import GOLDEN_ROLLOUTS

import canopy_store
from canopy_store import DataError, StoreError, UsageError, compare
from canopy_store.analysis.lengths import length_shares
from canopy_store.analysis.words import verdict
from canopy_store.report import cards, facts, sections, write_figures, write_report

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
CHROMEDRIVER = os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHARTS = {
    "changes",
    "arrows",
    "ce-star-length",
    "ce-star-stop",
    "trajectory",
    "lengths",
    "rho",
    "diversity",
}
HOSTILE = "<img src=x onerror='window.hit=1'>\"]'\\ </script><script>window.hit=1</script>"


# ---- stores


def rollouts(
    families=("f",),
    variants=("base", "sft"),
    tasks=("math", "stories"),
    prompts=6,
    samples=8,
    longest=20,
    text="so it goes and ",
    seed=0,
) -> pl.DataFrame:
    """Rollouts with every column an import takes; treated variants are less uncertain."""
    rng = np.random.default_rng(seed)
    rows = []
    for family in families:
        for v, variant in enumerate(variants):
            for task in tasks:
                for prompt in range(prompts):
                    spread = rng.uniform(0.1, 1.0)
                    for sample in range(samples):
                        n = int(rng.integers(2, longest + 1))
                        entropy = rng.gamma(2, 0.5 - 0.2 * (v > 0), n) * (0.5 + spread)
                        vector = np.ones(8) + spread * rng.normal(size=8)
                        rows.append(
                            {
                                "family": family,
                                "variant": variant,
                                "task": task,
                                "prompt_id": f"{task} {prompt}",
                                "sample": sample,
                                "text": (text * n)[: 4 * n],
                                "entropy": entropy.tolist(),
                                "logprob": (-rng.exponential(entropy)).tolist(),
                                "eos_logprob": np.log(rng.uniform(0.01, 0.2, n)).tolist(),
                                "embedding": (vector / np.linalg.norm(vector)).tolist(),
                            }
                        )
    return pl.DataFrame(rows, schema_overrides={"sample": pl.Int64})


def store_of(folder: Path, frame: pl.DataFrame, longest: int = 20) -> Path:
    frame.write_parquet(folder / "rollouts.parquet")
    canopy_store.import_rollouts(folder / "s", folder / "rollouts.parquet", max_new_tokens=longest)
    return folder / "s"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return store_of(tmp_path_factory.mktemp("report"), rollouts())


@pytest.fixture(scope="module")
def page(root) -> Path:
    return write_report(root, root.parent / "report.html")


def facts_of(root: Path, **options) -> facts.Facts:
    defaults = {"baseline": "base", "selection": "all", "embedder": None, "runs": (), "seed": 42}
    return facts.gather(root, **{**defaults, "rollouts": 0, **options})


def data_of(page: Path) -> dict:
    """What the page carries, as its script reads it."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" [^>]*>(.*?)</script>', text, re.DOTALL)[1])


def chart_of(data: dict, name: str) -> list[dict]:
    """The rows that a chart draws."""
    (chart,) = [chart for chart in data["charts"] if chart["id"] == name]
    return chart["spec"]["datasets"]["rows"]


# ---- the browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator:
    if os.environ.get("CANOPY_NO_BROWSER"):
        pytest.skip("CANOPY_NO_BROWSER is set")
    for program in (CHROMIUM, CHROMEDRIVER):
        if not Path(program).exists():
            pytest.fail(f"{program} is missing: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(CHROMEDRIVER)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


@pytest.fixture
def browse(driver):
    """Opens a page at a width and theme, waits until it is drawn, and answers the driver."""

    def open_page(page: Path, width: int = 1200, theme: str = "light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(page.resolve().as_uri())
        drawn(driver, theme)
        return driver

    return open_page


def drawn(driver, theme: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 30, 0.05).until(
        lambda d: d.execute_script("return document.body.dataset.ready") == theme
    )


def all_text(driver, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return driver.execute_script(script, selector)


def choose(driver, control: str, value: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element(By.ID, control)).select_by_value(value)


def assert_quiet(driver) -> None:
    """No message in the console, nothing fetched but the page itself."""
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requested = [
        m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
    ]
    assert len(requested) == 1
    assert requested[0].startswith("file://")


# ---- what it draws


def test_the_page_opens_quietly_and_asks_nothing_of_the_network(browse, page):
    driver = browse(page)
    assert_quiet(driver)
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert not re.search(r"cdn\.|jsdelivr|unpkg|fonts\.googleapis|@import", text)
    blocked = "return fetch('https://example.org').then(() => 'fetched', () => 'blocked')"
    assert driver.execute_script(blocked) == "blocked"


def test_every_chart_is_drawn_and_explained(browse, page):
    driver = browse(page)
    counts = driver.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('figure.chart')].map((f) => [f.id,"
        " f.querySelectorAll('.drawing svg .mark-symbol path, .drawing svg .mark-line path,"
        " .drawing svg .mark-rect path, .drawing svg .mark-area path').length]))"
    )
    assert set(counts) == CHARTS
    assert min(counts.values()) > 1, counts
    assert all(len(text) > 60 for text in all_text(driver, "figure.chart .how"))
    labels = driver.execute_script(
        "return [...document.querySelectorAll('.drawing [aria-roledescription=visualization],"
        " .drawing[aria-roledescription=visualization]')].map((s) => s.getAttribute('aria-label'))"
    )
    assert len(labels) == len(CHARTS)
    assert all(labels)


def test_the_first_screen_says_what_is_compared_with_key_figures(browse, page, root):
    driver = browse(page)
    assert all_text(driver, "h1") == ["sft against base"]
    bottom = "return document.querySelector('#figures').getBoundingClientRect().bottom"
    assert driver.execute_script(bottom) < 900
    (row,) = compare(root).filter(level="family", metric="ce_star").to_dicts()
    ends = [row[f"percent_delta{end}"] for end in ("", "_ci_low", "_ci_high")]
    change, low, high = (f"{x:+.1f}%".replace("-", "−") for x in ends)
    card = "#figures > :first-child "
    assert all_text(driver, card + "dt") == ["Canopy entropy,\u00a0CE* (first 20 tokens)"]
    assert all_text(driver, card + ".value") == [f"{row['baseline']:.3g} → {row['treated']:.3g} nats"]
    assert all_text(driver, card + ".change") == [f"{change} ({low} to {high})"]
    assert verdict(row).startswith(all_text(driver, card + ".verdict")[0])
    assert all(all_text(driver, "#figures .interval"))
    assert len(all_text(driver, "#figures .interval")) == len(all_text(driver, "#figures dt"))
    assert len(all_text(driver, "#headline")[0]) > 40


def test_a_card_says_how_much_its_nats_are(browse, page, root):
    driver = browse(page)
    changes = compare(root).filter(level="family")
    (row,) = changes.filter(metric="ce_star").to_dicts()
    (length,) = changes.filter(metric="mean_length").to_dicts()
    base, treated, ratio = all_text(driver, ".answers li")
    assert base.startswith("base: ")
    for text, side in ((base, "baseline"), (treated, "treated")):
        count = re.search(r": (.+) equally likely answers", text)[1]
        assert number_of(count) == pytest.approx(np.exp(row[side]), rel=0.3)
        rate = row[side] / length[side]
        bits = rate / np.log(2)
        assert f"per token {rate:.2f} nats ({bits:.2f} bits)" in text
        assert number_of(re.search("a choice among (.+)[.]", text)[1]) == pytest.approx(
            2**bits, rel=0.06
        )
    times = re.search("base has (.+) times as many answers as sft", ratio)[1]
    assert number_of(times) == pytest.approx(np.exp(-row["delta"]), rel=0.06)


def number_of(text: str) -> float:
    """The number that '4,700', '5 × 10¹⁸' or '10²¹⁷' is."""
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    factor, _, power = text.rpartition("10") if re.search("10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]", text) else (text, "", "")
    factor = factor.removesuffix(" × ").replace(",", "") or "1"
    return float(factor) * 10.0 ** int(power.translate(digits) or 0)


def test_the_numbers_of_a_chart_can_be_read_as_a_table(browse, page):
    driver = browse(page)
    driver.execute_script("document.querySelector('#rho details').open = true")
    time.sleep(0.2)
    assert len(all_text(driver, "#rho details tbody tr")) == 4


def test_tables_sort_by_mouse_and_by_keyboard(browse, page):
    from selenium.webdriver.common.keys import Keys

    driver = browse(page)
    heads = driver.find_elements("css selector", "#metrics thead button")
    place = [head.get_attribute("textContent") for head in heads].index("ce_star")
    column = f"#metrics tbody td:nth-child({place + 1})"

    def values() -> list[float]:
        return [float(text) for text in all_text(driver, column)]

    heads[place].click()
    assert values() == sorted(values())
    heads[place].send_keys(Keys.ENTER)
    assert values() == sorted(values(), reverse=True)
    head = driver.find_elements("css selector", "#metrics thead th")[place]
    assert head.get_attribute("aria-sort") == "descending"


def test_the_explorer_works_by_mouse(browse, page):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = browse(page)

    def of_cards(pattern: str) -> tuple[list[float], list[float]]:
        values = [float(re.search(pattern, text)[1]) for text in all_text(driver, ".rollout .facts")]
        return values[::2], values[1::2]  # base and sft share a row

    base, sft = of_cards(r"(\d+) tokens?")
    assert (base, sft) == (sorted(base), sorted(sft))
    driver.find_element("id", "pick-order").click()
    turned = of_cards(r"(\d+) tokens?")
    assert turned == (base[::-1], sft[::-1])
    choose(driver, "pick-sort", "distance")
    for far in of_cards(r"distance ([\d.]+)"):
        assert far == sorted(far, reverse=True)
    names = all_text(driver, "#pick-model option")
    assert names == ["base and sft", "base", "sft"]
    choose(driver, "pick-model", "2")
    assert all_text(driver, "#rollouts h3") == ["sft"]
    step = driver.find_element("css selector", ".steps span")
    tint = step.value_of_css_property("background-color")
    ActionChains(driver).scroll_to_element(step).move_to_element(step).perform()
    assert re.match(r"Step 1 of \d+, entropy [\d.]+ nats, surprisal", all_text(driver, "#readout")[0])
    choose(driver, "pick-colour", "surprisal")
    after = driver.find_element("css selector", ".steps span").value_of_css_property("background-color")
    assert after != tint
    before = all_text(driver, "#prompt")
    choose(driver, "pick-prompt", "1")
    assert all_text(driver, "#prompt") != before
    assert "are on this page" in all_text(driver, "#explorer-shown")[0]


def boxes(driver, selector: str) -> list[dict[str, float]]:
    """left, right, top and bottom of each element, in pixels."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.getBoundingClientRect())"
        ".map((r) => ({left: r.left, right: r.right, top: r.top, bottom: r.bottom}))"
    )
    return driver.execute_script(script, selector)


def test_base_and_child_share_a_row_and_are_stacked_on_a_phone(browse, page):
    driver = browse(page)
    wide = boxes(driver, ".rollout")
    assert len(wide) == 12
    for base, sft in zip(wide[::2], wide[1::2], strict=True):
        assert (base["top"], base["bottom"]) == (sft["top"], sft["bottom"])
        assert base["right"] < sft["left"]
    who = [text.split(" · ")[0] for text in all_text(driver, ".rollout .facts")]
    assert who == ["base", "sft"] * 6
    assert all_text(driver, "#task") == ["Task: math"]
    assert {text.split(": ")[0] for text in all_text(driver, "#pick-prompt option")} == {
        "math",
        "stories",
    }
    narrow = boxes(browse(page, width=390), ".rollout")
    for above, below in pairwise(narrow):
        assert above["left"] == below["left"]
        assert above["bottom"] < below["top"]


def test_a_prompt_that_one_model_lacks_says_so(browse, tmp_path):
    frame = rollouts().filter((pl.col("variant") == "base") | (pl.col("prompt_id") != "math 0"))
    few = (pl.col("variant") == "base") | (pl.col("prompt_id") != "math 1") | (pl.col("sample") < 2)
    root = store_of(tmp_path, frame.filter(few))
    driver = browse(write_report(root, tmp_path / "report.html"))
    said = {}
    options = all_text(driver, "#pick-prompt option")
    for place, option in enumerate(options):
        choose(driver, "pick-prompt", str(place))
        said[option] = all_text(driver, "#rollouts .missing")
    assert said["math: math 0"] == ["sft has no rollout of this prompt."]
    assert said["math: math 1"] == ["sft has no further rollout of this prompt here."] * 4
    assert not any(said[option] for option in options if option not in ("math: math 0", "math: math 1"))


def test_no_token_is_coloured_in_a_place_that_is_not_known(browse, page, root):
    """The store keeps no token strings: a box a token in order, and the text beside it uncoloured."""
    driver = browse(page)
    counted = [int(re.search(r"(\d+) tokens?", t)[1]) for t in all_text(driver, ".rollout .facts")]
    strips = driver.execute_script(
        "return [...document.querySelectorAll('.steps')].map((s) => s.childElementCount)"
    )
    assert strips == counted
    placed = [f"0 of {n} token{'s' * (n != 1)} placed on the text" for n in counted]
    assert all_text(driver, ".rollout .placed") == placed
    assert all(text == "" for text in all_text(driver, ".steps"))
    script = "return document.querySelectorAll('.rollout .text *').length"
    assert driver.execute_script(script) == 0
    assert "no strings of tokens" in all_text(driver, "#explorer-how")[0]


def test_the_explorer_and_the_theme_work_by_keyboard(browse, page):
    from selenium.webdriver.common.keys import Keys

    driver = browse(page)
    driver.find_element("id", "pick-colour").send_keys("s")
    assert "surprisal" in driver.find_element("id", "scale-end").text
    order = driver.find_element("id", "pick-order")
    order.send_keys(Keys.SPACE)
    assert order.text == "Largest first"
    for _ in range(3):  # model by model, the first rollout is a few stops further on
        driver.switch_to.active_element.send_keys(Keys.TAB)
        if "steps" in (driver.switch_to.active_element.get_attribute("class") or ""):
            break
    steps = driver.switch_to.active_element
    steps.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert all_text(driver, "#readout")[0].startswith("Step 2 of ")
    driver.find_element("id", "theme").send_keys(Keys.ENTER)
    drawn(driver, "dark")


def test_text_of_a_rollout_is_whole(browse, page, root):
    driver = browse(page)
    shown = all_text(driver, ".rollout .text")
    assert shown
    assert set(shown) <= set(canopy_store.read(root, "rollouts")["text"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_follows_the_theme_and_can_be_switched(browse, page, theme):
    other = "dark" if theme == "light" else "light"
    driver = browse(page, theme=theme)

    def paper() -> int:
        colour = "return getComputedStyle(document.body).backgroundColor"
        return sum(int(x) for x in re.findall(r"\d+", driver.execute_script(colour))[:3])

    def strokes() -> set[str]:
        script = (
            "return [...document.querySelectorAll('#rho svg text')].map((t) => t.getAttribute('fill'))"
        )
        return set(driver.execute_script(script))

    first, ink = paper(), strokes()
    assert (first < 200) == (theme == "dark")
    driver.find_element("id", "theme").click()
    drawn(driver, other)
    assert (paper() < 200) == (other == "dark")
    assert strokes() != ink


def test_a_phone_needs_no_scrolling_sideways(browse, page):
    driver = browse(page, width=390)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    widths = driver.execute_script(
        "return [...document.querySelectorAll('.drawing svg')]"
        ".map((s) => s.getBoundingClientRect().right)"
    )
    assert max(widths) <= 390


LONG = ("a_very_long_name_of_a_variant_that_goes_on_and_on", "שלום_עולם")


@pytest.fixture(scope="module")
def long_page(tmp_path_factory) -> Path:
    """Names that are longer than a phone is wide, words that read from the right."""
    folder = tmp_path_factory.mktemp("long")
    tasks = ["a task with a name that nobody would want to read twice", "עברית"]
    frame = rollouts(["a-family-of-models-7b"], ["base", *LONG], tasks, text="שלום עולם ")
    return write_report(store_of(folder, frame), folder / "report.html")


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("which", ["page", "long_page"])
def test_labels_of_a_chart_do_not_overlap(browse, request, which, width):
    driver = browse(request.getfixturevalue(which), width=width)
    labels = driver.execute_script(
        "return [...document.querySelectorAll('.drawing')].map((d) =>"
        " [...d.querySelectorAll('svg text')]"
        ".map((t) => { const r = t.getBoundingClientRect(); return {text: t.textContent, left: r.left,"
        " right: r.right, top: r.top, bottom: r.bottom}; }).filter((t) => t.text && t.right > t.left))"
    )
    assert len(labels) == len(CHARTS)
    for chart in labels:
        assert chart
        for label in chart:
            assert label["left"] >= -1, label
            assert label["right"] <= width + 1, label
        for i, one in enumerate(chart):
            for other in chart[i + 1 :]:
                across = min(one["right"], other["right"]) - max(one["left"], other["left"])
                down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
                # boxes of lines of text reach a little into each other
                assert across < 1 or down < 3, (one, other)


@pytest.mark.parametrize("which", ["page", "long_page"])
def test_text_wraps_on_a_phone(browse, request, which):
    driver = browse(request.getfixturevalue(which), width=390)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    places = boxes(driver, "h1, h2, p, li, dd, dt, blockquote, .text, .controls *, .missing")
    assert max(box["right"] for box in places) <= 390


@pytest.mark.parametrize("width", [390, 1400])
def test_the_first_column_of_a_table_stays(browse, page, width):
    driver = browse(page, width=width)
    scrolled = driver.execute_script(
        "const s = document.querySelector('#metrics .scroll'); s.scrollLeft = 300; return s.scrollLeft"
    )
    assert scrolled > 100
    (around,) = boxes(driver, "#metrics .scroll")
    for cell in boxes(driver, "#metrics th:first-child"):
        assert cell["left"] == pytest.approx(around["left"], abs=2)
    for cell in boxes(driver, "#metrics td:nth-child(2)"):
        assert cell["left"] < around["left"]
    assert all_text(driver, "#metrics tbody th")[0] == "f.base.math"
    if width == 1400:
        (text,) = boxes(driver, "#metrics h2")
        assert around["right"] > text["right"]


# ---- colours


def test_a_colour_is_a_variant_in_every_chart_and_beside_its_name(browse, tmp_path):
    variants = ["base", "dpo", "sft"]
    root = store_of(tmp_path, rollouts(variants=variants))
    driver = browse(write_report(root, tmp_path / "report.html"))
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((d) => [d.parentElement.textContent,"
        " getComputedStyle(d).backgroundColor])"
    )
    choose(driver, "pick-model", "2")
    assert all_text(driver, "#pick-model option")[2] == "all"
    beside = {name: colour for name, colour in driver.execute_script(script, "#rollouts h3 .dot")}
    assert list(beside) == variants
    assert len(set(beside.values())) == 3
    for text, colour in driver.execute_script(script, "#figures .dot"):
        assert colour == beside[text.split(" · ")[0]]
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('.drawing')].map((d) => [...new Set("
        "[...d.querySelectorAll('.mark-symbol.role-mark path, .mark-line.role-mark path,"
        " .mark-rect.role-mark path, .mark-rule.role-mark line')]"
        ".flatMap((m) => [m.getAttribute('fill'), m.getAttribute('stroke')])"
        ".filter((c) => c && c !== 'none' && c !== 'transparent'))])"
    )
    hexes = {
        "rgb({}, {}, {})".format(*(int(c[i : i + 2], 16) for i in (1, 3, 5))): c
        for c in {c for colours in drawn for c in colours}
    }
    allowed = {hexes[colour] for colour in beside.values()}
    ink = {"#22262b", "#5d646c"}  # the marks of totals and of zero
    for colours in drawn:
        assert set(colours) <= allowed | ink, colours


# ---- strangers' text


def test_text_of_strangers_is_shown_as_text(browse, tmp_path):
    frame = rollouts(
        families=["a", "<img src=x onerror='hit=1'>"],
        tasks=["\"]'\\</script>"],
        prompts=4,
        text=HOSTILE + " {{data}} ",
    )
    frame = frame.with_columns(
        variant=pl.col("variant").replace({"sft": "<b>sft</b>"}),
        prompt_id=pl.col("prompt_id") + HOSTILE,
    )
    page = write_report(store_of(tmp_path, frame), tmp_path / "report.html")
    driver = browse(page)
    assert_quiet(driver)
    assert driver.execute_script("return window.hit") is None
    assert driver.execute_script("return document.querySelectorAll('b, img').length") == 0
    assert all_text(driver, "h1") == ["<b>sft</b> against base"]
    assert HOSTILE in all_text(driver, "#prompt")[0]
    assert any("<img src=x onerror" in text for text in all_text(driver, ".rollout .text"))
    assert any("<b>sft</b>" in text for text in all_text(driver, "#rho svg text"))
    assert page.read_text(encoding="utf-8").count("</script>") == 3
    script = "document.querySelector('main').insertAdjacentHTML('beforeend', arguments[0])"
    driver.execute_script(script, "<img src='x' onerror='window.hit = 1'>")
    time.sleep(0.2)
    assert driver.execute_script("return window.hit") is None, "the policy itself lets no script run"


# ---- what is missing


def missing(root: Path, **options) -> dict[str, str]:
    charts = sections.charts(facts_of(root, **options))
    return {chart["id"]: chart["missing"] for chart in charts if "missing" in chart}


def test_a_store_without_embeddings_says_so(browse, tmp_path):
    bare = rollouts().drop("embedding", "text", "logprob", "eos_logprob")
    root = store_of(tmp_path, bare)
    lacking = missing(root)
    assert set(lacking) == {"arrows", "diversity", "ce-star-stop"}
    assert "canopy ingest embed" in lacking["diversity"]
    assert "eos_logprob" in lacking["ce-star-stop"]
    driver = browse(write_report(root, tmp_path / "report.html"))
    assert_quiet(driver)
    assert len(all_text(driver, "figure .missing")) == 3
    assert any("Nothing is embedded" in note for note in all_text(driver, "#notes li"))
    assert set(all_text(driver, ".rollout .lacking")) == {"No text is stored."}
    assert driver.execute_script("return document.querySelectorAll('.steps span').length") > 0
    reasons = all_text(driver, "section .missing")
    assert reasons == [
        "No complete run stores log-probabilities, which the check needs.",
        "No complete run stores both eos_logprob and how its rollouts ended.",
    ]
    assert all_text(driver, "#pick-colour option:disabled") == ["surprisal of the token"]


def test_one_variant_alone_has_nothing_to_compare(tmp_path):
    root = store_of(tmp_path, rollouts(variants=["base"]))
    lacking = missing(root)
    assert set(lacking) == {"changes", "arrows"}
    with pytest.raises(DataError) as refusal:
        compare(root)
    assert lacking["changes"] == f"Nothing is compared: {refusal.value}."
    assert "--baseline zero: no such variant" in missing(root, baseline="zero")["arrows"]


def test_a_page_without_a_comparison_says_so_and_shows_the_model(browse, tmp_path):
    root = store_of(tmp_path, rollouts(variants=["base"]))
    page = write_report(root, tmp_path / "report.html")
    driver = browse(page)
    assert_quiet(driver)
    reason = "Nothing is compared: base is the only variant: there is nothing to compare it with."
    assert reason in all_text(driver, "#notes li")
    data = data_of(page)
    (figure,) = [f for f in data["figures"] if f["metric"] == "ce_star"]
    pooled = canopy_store.read(root, "prompt_metrics")["ce_star"].mean()
    assert figure["rows"][0]["value"] == pytest.approx(pooled, rel=1e-12)
    (row, _) = chart_of(data, "rho")
    assert row["ci_low"] < row["rho_pearson"] < row["ci_high"]


def test_a_model_that_is_compared_with_none_stands_beside_those_that_are(tmp_path):
    frame = rollouts(variants=["base", "sft"]).filter(
        (pl.col("variant") == "base") | (pl.col("task") == "math")
    )
    root = store_of(tmp_path, frame)
    data = data_of(write_report(root, tmp_path / "report.html"))
    rho = [(row["panel"], row["variant"]) for row in chart_of(data, "rho")]
    assert rho == [("math", "base"), ("math", "sft"), ("stories", "base")]
    assert {row["panel"] for row in chart_of(data, "changes")} == {"math"}


def test_what_a_chart_leaves_out_is_named_with_the_reason(tmp_path):
    lacks = (pl.col("variant") == "sft") & (pl.col("task") == "stories")
    frame = rollouts().with_columns(
        pl.when(lacks).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("embedding", "eos_logprob")
    )
    for name, rows in (("a", frame.filter(~lacks)), ("b", frame.filter(lacks))):
        (tmp_path / name).mkdir()
        rows = rows if name == "a" else rows.drop("embedding", "eos_logprob")
        rows.write_parquet(tmp_path / name / "rollouts.parquet")
        canopy_store.import_rollouts(
            tmp_path / "s", tmp_path / name / "rollouts.parquet", max_new_tokens=20
        )
    shown = {c["id"]: c.get("shown", "") for c in sections.charts(facts_of(tmp_path / "s"))}
    assert "Not drawn: sft on stories: not compared, or not embedded for both." in shown["arrows"]
    assert "Not drawn: sft on stories: not embedded" in shown["diversity"]
    assert "Not drawn: sft on stories: no eos_logprob is stored." in shown["ce-star-stop"]
    assert not shown["trajectory"]


def test_the_share_cut_is_printed_and_marked(browse, tmp_path):
    """base is cut at 12 tokens where sft mostly ends by itself."""
    both = rollouts(prompts=8, samples=12)
    base = both.filter(variant="base").with_columns(
        pl.col(name).list.head(12) for name in ("entropy", "logprob", "eos_logprob")
    )
    sft = both.filter(pl.col("variant") == "sft", pl.col("entropy").list.len() <= 12)
    root = store_of(tmp_path, pl.concat([base, sft]), longest=12)
    driver = browse(write_report(root, tmp_path / "report.html"))
    assert_quiet(driver)
    metrics = canopy_store.read(root, "model_metrics")
    shares = {(r["task"], r["variant"]): 100 * r["truncation_rate"] for r in metrics.to_dicts()}
    words = [text for text in all_text(driver, "#lengths svg text") if text.startswith("cut: ")]
    expected = [
        f"cut: base {shares[task, 'base']:.3g}% · sft {shares[task, 'sft']:.3g}%"
        for task in ("math", "stories")
    ]
    assert words == expected
    assert min(shares.values()) < 15
    assert max(shares.values()) > 30
    assert any(text.startswith("cut shares differ: ") for text in all_text(driver, "#figures .marked"))
    assert any("cut shares differ" in text for text in all_text(driver, "#notes li"))
    bars = " ".join(all_text(driver, "#ce-star-length svg text"))
    assert f"{round(shares['math', 'base'])}% cut" in bars
    assert "CE* (first 12 tokens), nats" in bars
    marked = all_text(driver, "#metrics td.no")
    assert len(marked) == sum(share > 5 for share in shares.values())
    hollow = driver.execute_script(
        "return [...document.querySelectorAll('#changes .mark-symbol.role-mark path')]"
        ".map((p) => p.getAttribute('fill-opacity'))"
    )
    assert set(hollow) == {"0"}


def test_low_reliability_is_said_with_the_command_that_corrects(tmp_path):
    """Every prompt alike: what differs between prompts is the chance of the rollouts."""
    rng = np.random.default_rng(1)
    frame = rollouts(samples=4).with_columns(
        entropy=pl.Series([rng.gamma(1, 1, len(x)).tolist() for x in rollouts(samples=4)["entropy"]])
    )
    gathered = facts_of(store_of(tmp_path, frame))
    assert gathered.reliability["reliability"].max() < 0.8
    (shown,) = [c["shown"] for c in sections.charts(gathered) if c["id"] == "diversity"]
    assert "canopy regress --store … --errors moments" in shown
    for row in gathered.reliability.to_dicts():
        assert f"{row['variant']} {row['reliability']:.2f}" in shown


def test_a_selection_is_a_mean_of_a_subset(browse, tmp_path):
    frame = rollouts()
    rewards = pl.Series(np.random.default_rng(0).normal(size=len(frame)))
    root = store_of(tmp_path, frame.with_columns(reward=rewards))
    canopy_store.select_reward(root, 0.5)
    page = write_report(root, tmp_path / "report.html", selection="reward_top_50")
    driver = browse(page)
    assert all_text(driver, ".answers li") == [
        "Of the selection reward_top_50: a subset's mean, not an entropy of answers."
    ]
    assert "CE* (first 20 tokens; mean of a subset), nats" in all_text(
        driver, "#ce-star-length svg text"
    )
    assert "subset mean, not an entropy" in all_text(driver, "#figures .marked")


def test_runs_that_are_not_complete_are_named(browse, tmp_path):
    root = store_of(tmp_path, rollouts())
    (root / "commits" / "rollouts" / "run=f.sft.math.json").unlink()
    gathered = facts_of(root)
    assert any("Not complete" in n and "f.sft.math" in n for n in facts.notes(gathered))
    assert len(gathered.shown) == 3
    for path in (root / "commits" / "rollouts").iterdir():
        path.unlink()
    driver = browse(write_report(root, tmp_path / "report.html"))
    assert_quiet(driver)
    assert all_text(driver, "h1") == ["Nothing to measure yet"]
    assert set(all_text(driver, "figure .missing")) == {"No run is complete yet."}
    assert len(all_text(driver, "#runs tbody tr")) == 4
    with pytest.raises(StoreError, match="nothing to draw"):
        write_figures(root, tmp_path / "figures")


def test_an_empty_store_is_an_error_of_one_line(tmp_path):
    root = canopy_store.init(tmp_path / "s")
    with pytest.raises(StoreError, match="empty; fill it with") as raised:
        write_report(root, tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_wrong_names_are_refused_with_those_there_are(root, tmp_path):
    out = tmp_path / "report.html"
    for option in ({"embedder": "x"}, {"selection": "x"}, {"runs": ["x"]}):
        with pytest.raises(DataError) as raised:
            write_report(root, out, **option)
        with pytest.raises(DataError) as refusal:
            compare(root, **option)
        assert str(raised.value) == str(refusal.value)
    with pytest.raises(UsageError, match="is a folder"):
        write_report(root, tmp_path)
    with pytest.raises(UsageError, match="explorer_rollouts -1"):
        write_report(root, out, explorer_rollouts=-1)


# ---- numbers, files, size


ENDS = ("", "_ci_low", "_ci_high")


def test_every_change_and_interval_is_that_of_compare(tmp_path):
    """To the last bit; tasks of different numbers of prompts, two families, three variants."""
    variants = ["base", "dpo", "sft"]
    few = rollouts(["f", "g"], variants, ["math"], prompts=4, seed=1)
    many = rollouts(["f", "g"], variants, ["stories"], prompts=9, seed=2)
    root = store_of(tmp_path, pl.concat([few, many]))
    data = data_of(write_report(root, tmp_path / "report.html"))
    compared = compare(root)
    pooled = compared.filter(level="all")
    assert [figure["metric"] for figure in data["figures"]] == list(cards.KEY_FIGURES)
    for figure in data["figures"]:
        assert [row["variant"] for row in figure["rows"]] == ["dpo", "sft"]
        for row in figure["rows"]:
            (expected,) = pooled.filter(metric=figure["metric"], variant=row["variant"]).to_dicts()
            for part in ("baseline", "treated", "delta", "percent_delta"):
                for end in ENDS:
                    assert row[part + end] == expected[part + end], (figure["metric"], part, end)
    # a mean of the two tasks' means would be another number
    (ce_star,) = [f for f in data["figures"] if f["metric"] == "ce_star"]
    tasks = compared.filter(level="task", metric="ce_star", variant="sft")["treated"].mean()
    assert ce_star["rows"][1]["treated"] != pytest.approx(tasks, rel=1e-3)

    cells = compared.filter(level="task")
    names = pl.col("metric").replace({**sections._CHANGES, "ce_star": "CE* (first 20 tokens)"})
    panel = pl.format("{} · {}", "family", "task")
    key = ["panel", "variant", "metric"]
    ours = pl.DataFrame(chart_of(data, "changes")).sort(key)
    columns = [*key, "n_prompts", *(f"percent_delta{end}" for end in ENDS)]
    theirs = cells.filter(pl.col("metric").is_in(list(sections._CHANGES))).with_columns(
        names, panel=panel
    )
    assert ours.select(columns).equals(theirs.select(columns).sort(key))
    assert len(ours) == 4 * 2 * len(set(sections._CHANGES) - {"accuracy"})  # nothing is graded here

    rho = pl.DataFrame(chart_of(data, "rho")).sort("panel", "variant")
    cells = cells.with_columns(panel=panel)
    for row in rho.iter_rows(named=True):
        part = "baseline" if row["variant"] == "base" else "treated"
        other = "sft" if part == "baseline" else row["variant"]
        where = {"metric": "rho_pearson", "panel": row["panel"], "variant": other}
        (expected,) = cells.filter(**where).to_dicts()
        assert row["rho_pearson"] == expected[part]
        assert (row["ci_low"], row["ci_high"]) == tuple(expected[part + end] for end in ENDS[1:])
    assert len(rho) == 4 * 3

    arrows = chart_of(data, "arrows")
    assert len(arrows) == 4 * 2
    for row in arrows:
        for metric, axis in (("entropy_rate", "rate"), ("semantic_diversity", "diversity")):
            where = {key: row[key] for key in ("panel", "variant")}
            (expected,) = cells.filter(metric=metric, **where).to_dicts()
            assert (row[f"{axis}_from"], row[f"{axis}_to"]) == (
                expected["baseline"],
                expected["treated"],
            )


def test_another_seed_is_that_of_compare(root, tmp_path):
    data = data_of(write_report(root, tmp_path / "report.html", seed=7))
    (expected,) = compare(root, seed=7).filter(level="family", metric="ce_star").to_dicts()
    row = data["figures"][0]["rows"][0]
    assert row["delta_ci_low"] == expected["delta_ci_low"]
    other = compare(root).filter(level="family", metric="ce_star")
    assert row["delta_ci_low"] != other["delta_ci_low"][0]


def test_the_report_holds_no_statistics_and_no_sql():
    folder = Path(sections.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"(?m)^\s*(?:import|from) (\w+)", text))
        assert not re.search(r"(?i)\bselect\b.+\bfrom\b|\.sql\(|\.execute\(", text), path.name
    assert "polars" in imported
    assert not imported & {"numpy", "scipy", "statsmodels", "duckdb"}


def test_lengths_are_one_less_their_distribution_function(root):
    stored = canopy_store.read(root, "rollouts")
    with canopy_store.open(root) as con:
        runs = canopy_store.read(root, "runs")["run_id"].to_list()
        shares = length_shares(con, runs)
    assert shares["run_id"].n_unique() == 4
    for (run,), one in shares.group_by("run_id"):
        own = stored.filter(run_id=run)
        n, cut = own["n_tokens"].to_numpy(), (own["finish_reason"] == "length").to_numpy()
        assert one["length"].to_list() == list(range(21))
        for length, going_on in one.select("length", "going_on").iter_rows():
            assert going_on == pytest.approx(np.mean((n > length) | cut), abs=1e-12)
    last = shares.filter(length=20).sort("run_id")["going_on"].to_list()
    rates = canopy_store.read(root, "model_metrics").sort("run_id")["truncation_rate"].to_list()
    assert last == pytest.approx(rates, abs=1e-12)


def test_rollouts_whose_cap_is_not_recorded_are_drawn_to_the_longest(tmp_path):
    frame = rollouts(tasks=["math"])
    frame.write_parquet(tmp_path / "rollouts.parquet")
    canopy_store.import_rollouts(tmp_path / "s", tmp_path / "rollouts.parquet")
    data = data_of(write_report(tmp_path / "s", tmp_path / "report.html"))
    rows = chart_of(data, "lengths")
    assert max(row["length"] for row in rows) == frame["entropy"].list.len().max()
    assert [row["cut"] for row in rows if row["cut"]] == ["cut: base unknown · sft unknown"]
    assert data["figures"][0]["name"] == "Canopy entropy,\u00a0CE*"


def test_lengths_are_thinned_and_the_last_is_kept(root):
    with canopy_store.open(root) as con:
        runs = canopy_store.read(root, "runs")["run_id"].to_list()
        shares = length_shares(con, runs[:1], points=6)
    assert shares["length"].to_list() == [0, 4, 8, 12, 16, 20]


def test_figures_are_the_same_charts_as_pdf_and_svg(root, tmp_path):
    written = write_figures(root, tmp_path / "figures")
    assert {path.name for path in written} == {f"{c}.{s}" for c in CHARTS for s in ("pdf", "svg")}
    for path in written:
        start = path.read_bytes()[:5]
        assert start == (b"%PDF-" if path.suffix == ".pdf" else b"<svg "), path
    assert "semantic diversity" in (tmp_path / "figures" / "diversity.svg").read_text(encoding="utf-8")


def test_the_same_store_and_seed_make_the_same_page(root, page, tmp_path):
    again = write_report(root, tmp_path / "report.html")
    assert again.read_bytes() == page.read_bytes()
    other = write_report(root, tmp_path / "other.html", seed=1, explorer_rollouts=10)
    assert other.read_bytes() != page.read_bytes()


def test_two_runs_of_a_model_and_task_are_refused_until_one_is_named(tmp_path, canopy):
    root, out = tmp_path / "s", tmp_path / "report.html"
    canopy_store.import_rollouts(root, GOLDEN_ROLLOUTS, max_new_tokens=64)
    golden = pl.read_parquet(GOLDEN_ROLLOUTS)
    keys = ["family", "variant", "task"]
    first = golden.select(keys).head(1)
    golden.join(first, on=keys, how="semi").write_parquet(tmp_path / "again.parquet")
    canopy_store.import_rollouts(root, tmp_path / "again.parquet", run="again")
    with pytest.raises(DataError) as refusal:
        compare(root)
    assert "has several runs, again, " in str(refusal.value)
    for write in (write_report, write_figures):
        with pytest.raises(DataError) as raised:
            write(root, out)
        assert str(raised.value) == str(refusal.value)
    code, printed, err = canopy("report", "--store", root, "--out", out)
    assert (code, printed, err) == (1, "", f"canopy: {refusal.value}\n")
    assert not out.exists()
    other = ".".join(first.row(0))
    runs = [r for r in canopy_store.read(root, "runs")["run_id"] if r != other]
    options = [part for run in runs for part in ("--run", run)]
    assert canopy("report", "--store", root, "--out", out, *options)[0] == 0
    data = data_of(out)
    expected = compare(root, runs=runs).filter(level="all", metric="ce_star").row(0, named=True)
    assert data["figures"][0]["rows"][0]["delta_ci_high"] == expected["delta_ci_high"]
    assert any("Not shown in the charts" in note and other in note for note in data["notes"])


def test_a_large_store_is_sampled_and_the_page_says_so(browse, tmp_path):
    prompts, samples = 330, 5
    rng = np.random.default_rng(0)
    runs = [(f, v, t) for f in ("p", "q") for v in ("base", "sft") for t in ("math", "stories")]
    size = prompts * samples
    frames = []
    for family, variant, task in runs:
        n = rng.integers(5, 30, size)
        vectors = rng.normal(size=(size, 8)) + 1
        frames.append(
            pl.DataFrame(
                {
                    "family": family,
                    "variant": variant,
                    "task": task,
                    "prompt_id": np.repeat(np.arange(prompts), samples),
                    "sample": np.tile(np.arange(samples), prompts),
                    "text": ["one more word " * int(k) for k in n],
                    "entropy": [rng.gamma(2, 0.5, k).tolist() for k in n],
                    "embedding": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist(),
                }
            )
        )
    root = store_of(tmp_path, pl.concat(frames), longest=29)
    started = time.perf_counter()
    page = write_report(root, tmp_path / "report.html")
    assert time.perf_counter() - started < 30
    assert page.stat().st_size < 6_000_000
    driver = browse(page)
    assert_quiet(driver)
    assert "320 of 13,200 rollouts are on this page" in all_text(driver, "#explorer-shown")[0]
    assert "2,400 of 2,640 prompts are drawn" in " ".join(all_text(driver, "#diversity p"))


def test_pass_at_k_is_drawn_where_rollouts_are_graded(tmp_path):
    """Against the estimator, prompt by prompt; the sentence beneath says where the curves cross."""
    hits = {"base": (1, 1, 1), "sft": (8, 0, 0)}  # of eight rollouts, on each of three prompts
    rows = rollouts(tasks=("math",), prompts=3, samples=8)
    right = [
        row["sample"] < hits[row["variant"]][int(row["prompt_id"][-1])]
        for row in rows.iter_rows(named=True)
    ]
    root = store_of(tmp_path, rows.with_columns(correct=pl.Series(right)))
    page = write_report(root, tmp_path / "report.html")
    drawn = {(row["variant"], row["k"]): row["value"] for row in chart_of(data_of(page), "pass-at-k")}
    expected = {("base", k): k / 8 for k in (1, 2, 4, 8)} | {("sft", k): 1 / 3 for k in (1, 2, 4, 8)}
    assert drawn == pytest.approx(expected, abs=1e-6)
    (said,) = [c["shown"] for c in data_of(page)["charts"] if c["id"] == "pass-at-k"]
    assert "base overtakes at k = 4" in said
