"""Requests and answers on the four tasks, from a small seeded grammar; original text.

Every task is a function of a random generator and a style: 'loose' answers vary in length and in
wording, 'tidy' ones keep to one short form. A base model reads loose ones, its child is fine-tuned on
tidy ones.
"""

from __future__ import annotations

from random import Random

NAMES = ["Mia", "Tom", "Anna", "Ben", "Lea", "Paul", "Nora", "Finn", "Ida", "Max", "Ella", "Jon"]
THINGS = ["apples", "coins", "eggs", "rolls", "stamps", "shells", "pears", "books", "cards", "nuts"]
NOUNS = ["fox", "girl", "sailor", "robot", "baker", "mouse", "boy", "crow", "clock", "lamp", "child"]
SIGHTS = ["sea", "garden", "river", "forest", "bridge", "harbour", "mountain", "village", "mill"]
HEROES = [
    f"{adjective} {noun}"
    for adjective in ["old", "young", "small", "clever", "quiet", "brave", "tired", "lonely"]
    for noun in NOUNS
]
PLACES = [f"{where} the {what}" for where in ["near", "behind", "under", "beside"] for what in SIGHTS]
WISHES = [
    f"{verb} {what}"
    for verb in ["find", "see", "build", "keep", "mend", "carry"]
    for what in ["a boat", "a key", "the moon", "a kite", "a warm house", "the last map", "a song"]
]
EVENTS = [
    "the rain came and the road was gone",
    "nobody knew the way",
    "the wind was much too strong",
    "a stranger knocked at the door",
    "the bread would not rise",
    "winter came a day too early",
    "the lamp went out",
    "a letter arrived",
    "the boat began to leak",
    "the key did not fit",
]
ENDINGS = [
    "a friend came to help",
    "the morning was bright again",
    "they laughed about it together",
    "it was enough to be at home",
    "the crow showed the way",
    "patience was the answer",
]
SCENES = [
    f"{who} {what}"
    for who in [
        "the river",
        "the baker",
        "a cold wind",
        "the whole village",
        "an old dog",
        "the gardener",
        "the last ferry",
        "a flock of birds",
        "the light",
        "everyone at the market",
    ]
    for what in [
        "moved slowly towards the hills",
        "waited for the evening",
        "was gone before noon",
        "came back every spring",
        "made the street look new",
        "kept a secret",
        "turned to the sea",
    ]
]
OPENINGS = [
    "The old harbour was quiet, and",
    "When the snow melted,",
    "After three days of rain,",
    "The train leaves at seven, but",
    "A good garden begins with the soil, and",
    "Long ago,",
    "Most people in the village knew that",
    "At the edge of the forest there was a house where",
]
# what a function does, its name, its arguments, and an expression that does it
FUNCTIONS = [
    ("returns the larger of two numbers", "larger", "a, b", "a if a > b else b"),
    ("returns the smaller of two numbers", "smaller", "a, b", "a if a < b else b"),
    ("adds two numbers", "add", "a, b", "a + b"),
    ("multiplies two numbers", "multiply", "a, b", "a * b"),
    ("counts the vowels in a string", "count_vowels", "text", "sum(c in 'aeiou' for c in text)"),
    ("counts the words in a sentence", "count_words", "text", "len(text.split())"),
    ("returns the list in reverse order", "reverse", "items", "items[::-1]"),
    ("says whether a number is even", "is_even", "n", "n % 2 == 0"),
    ("says whether a number is odd", "is_odd", "n", "n % 2 == 1"),
    ("adds up the squares of a list", "sum_squares", "items", "sum(x * x for x in items)"),
    ("finds the longest word in a sentence", "longest", "text", "max(text.split(), key=len)"),
    ("returns the first item of a list", "first", "items", "items[0]"),
    ("returns the last item of a list", "last", "items", "items[-1]"),
    ("turns Celsius into Fahrenheit", "fahrenheit", "c", "c * 9 / 5 + 32"),
    ("says whether a word is a palindrome", "palindrome", "word", "word == word[::-1]"),
    ("returns the first n even numbers", "evens", "n", "[2 * i for i in range(n)]"),
    ("removes repeated items from a list", "unique", "items", "list(dict.fromkeys(items))"),
    ("merges two sorted lists", "merge", "a, b", "sorted(a + b)"),
]


def coding(random: Random, style: str) -> tuple[str, str]:
    """A request for a function, and the function."""
    does, name, arguments, value = random.choice(FUNCTIONS)
    request = f"Write a Python function that {does}."
    if style == "tidy":
        return request, f"def {name}({arguments}):\n    return {value}"
    lines = [f"def {random.choice([name, name, 'f', 'solve', 'do_' + name])}({arguments}):"]
    if random.random() < 0.4:
        lines.append(f'    """This function {does}."""')
    if random.random() < 0.3:
        lines.append(f"    # {random.choice(['first the easy case', 'todo', 'it is short'])}")
    if random.random() < 0.5:
        lines += [f"    result = {value}", "    return result"]
    else:
        lines.append(f"    return {value}")
    if random.random() < 0.3:
        lines += ["", f"print({name}({random.choice(['3, 4', 'x', '[1, 2, 3]'])}))"]
    return request, "\n".join(lines)


def completion(random: Random, style: str) -> tuple[str, str]:
    """The beginning of a passage, and how it goes on."""
    count = 1 if style == "tidy" else random.choice([1, 1, 2, 2, 3, 4])
    first, *rest = (random.choice(SCENES) for _ in range(count))
    return random.choice(OPENINGS), " ".join([f"{first}.", *(f"{s.capitalize()}." for s in rest)])


def math(random: Random, style: str) -> tuple[str, str]:
    """A word problem of one sum, and its solution."""
    name, things = random.choice(NAMES), random.choice(THINGS)
    a, b = random.randint(2, 20), random.randint(2, 9)
    request, sign, result = random.choice(
        [
            (
                f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
                "+",
                a + b,
            ),
            (f"{name} has {a + b} {things} and gives away {b}. How many {things} are left?", "-", a),
            (f"A box holds {a} {things}. How many {things} are in {b} boxes?", "*", a * b),
            (
                f"{name} shares {a * b} {things} equally among {b} bags. How many are in each bag?",
                "/",
                a,
            ),
        ]
    )
    left = {"+": a, "-": a + b, "*": a, "/": a * b}[sign]
    equation = f"{left} {sign} {b} = {result}"
    if style == "tidy":
        return request, f"{equation}. The answer is {result}."
    steps = [
        f"{name} starts with {left} {things}.",
        f"Then we look at the {b}.",
        "Let us think.",
        f"We write {left} {sign} {b}.",
        "This is not hard.",
        f"So it is {equation}.",
    ]
    said = [step for step in steps if random.random() < 0.4]
    endings = [f"The answer is {result}.", f"{result} {things}.", f"{equation}", f"It is {result}!"]
    return request, " ".join([*said, random.choice(endings)])


def stories(random: Random, style: str) -> tuple[str, str]:
    """A request for a story, and the story."""
    hero, wish = random.choice(HEROES), random.choice(WISHES)
    request = f"Tell a short story about a {hero} who wants to {wish}."
    hero, where = hero.split()[-1], random.choice(PLACES)
    start = f"Once a {hero} lived {where}."
    end = f"In the end {random.choice(ENDINGS)}."
    if style == "tidy":
        return request, f"{start} The {hero} wanted to {wish}. {end}"
    middle = [
        f"The {hero} wanted to {wish}.",
        f"But {random.choice(EVENTS)}.",
        f"One day {random.choice(EVENTS)}.",
        f"Then the {hero} went {random.choice(PLACES)}.",
        f'"I will {random.choice(WISHES)}," said the {hero}.',
        f"Nobody else did {wish}.".replace(f"did {wish}", f"wanted to {wish}"),
    ]
    said = [sentence for sentence in middle if random.random() < 0.45]
    return request, " ".join([start, *said, *([end] if random.random() < 0.7 else [])])


TASKS = {"coding": coding, "completion": completion, "math": math, "stories": stories}


def pairs(count: int, style: str, seed: int) -> list[tuple[str, str, str]]:
    """``count`` triples (task, request, answer), the four tasks in turn; they follow from ``seed``."""
    random = Random(seed)
    names = list(TASKS)
    made = []
    for i in range(count):
        task = names[i % len(names)]
        made.append((task, *TASKS[task](random, style)))
    return made


def joint(task: str) -> str:
    """What stands between a request and its answer: only a completion goes on in the same line."""
    return " " if task == "completion" else "\n"
