"""Invented values: names made of syllables, and choices from lists, such that no two splits share a value."""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence

from research.evaluation.recall.scenes import SPLITS, Split

STARTS = (
    "Vor", "Tess", "Bel", "Kar", "Mon", "Dra", "Lin", "Os", "Fer", "Gal", "Hal", "Ner", "Pel", "Quin", "Ral", "Sul",
    "Zev", "Jor", "Wyl", "Thim", "Bru", "Cav", "Ild", "Ush", "Yan", "Mav", "Plo", "Sker",
)  # fmt: skip
MIDDLES = ("a", "e", "i", "o", "an", "el", "or", "ir", "u", "av", "ey", "om")
PERSON_ENDS = ("ra", "lin", "bert", "sa", "mund", "ka", "dis", "neth", "vik", "lia", "ton", "wen")
FAMILY_ENDS = ("sted", "berg", "kov", "mark", "holt", "ditch", "fors", "wald", "ick", "gren", "smoor", "quist")
TOWN_ENDS = ("lund", "wick", "dor", "mere", "gard", "vale", "strand", "haven", "combe", "thorpe", "ness", "burgh")
PRODUCT_ENDS = ("tron", "ex", "max", "lux", "mat", "dyne", "flo", "pro", "zen", "tek", "vox", "ora")

STREET_SORTS = ("Street", "Road", "Lane", "Avenue", "Square", "Hill", "Row", "Terrace", "Close")
COMPANY_SORTS = ("Shipping", "Foods", "Instruments", "Textiles", "Bank", "Press", "Optics", "Timber", "Glass")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
ALLERGIES = ("peanuts", "shellfish", "pollen", "celery", "mustard", "sesame", "strawberries", "latex", "penicillin",
             "wasp stings", "cat hair", "lupins", "kiwi fruit", "hazelnuts", "soya", "aspirin", "mould", "nickel",
             "walnuts", "tomatoes", "dust mites", "egg white", "wool", "horse hair", "rye flour", "apricots", "iodine",
             "birch bark", "mussels", "garlic", "chlorine", "bee venom", "cashews", "oats", "ragweed", "paprika",
             "sulphites", "mango skin", "hay", "goose down", "lanolin", "cinnamon")  # fmt: skip
INSTRUMENTS = ("cello", "oboe", "banjo", "accordion", "harp", "tuba", "clarinet", "mandolin", "bassoon", "zither",
               "viola", "trombone", "bagpipes", "ukulele", "harmonica", "lute", "piccolo", "saxophone", "sitar",
               "double bass", "French horn")  # fmt: skip
VOICES = ("bass", "alto", "tenor", "soprano")
DISH_STYLES = ("smoked", "braised", "pickled", "curried", "roasted", "spiced", "stuffed", "fried", "glazed", "creamed",
               "grilled", "baked")  # fmt: skip
DISHES = ("turnips", "lentils", "aubergines", "trout", "quinces", "dumplings", "leeks", "chestnuts", "mackerel",
          "pumpkin", "cabbage", "mushrooms", "parsnips", "herring", "chickpeas", "fennel", "duck", "plums",
          "rabbit", "artichokes", "beetroot")  # fmt: skip


NOT_AGAIN = 10  # values of a sort, as many as a scene of five people has at most
MAX_DRAWS = 10_000


def in_split(value: str, split: Split) -> bool:
    """Return whether a value belongs to a split. Every value belongs to exactly one, by its CRC-32."""
    return SPLITS[zlib.crc32(value.lower().encode()) % len(SPLITS)] == split


class Inventor:
    """Draws values of one split, reproducibly. Names and numbers are drawn once only, other values not soon again."""

    def __init__(self, seed: int, split: Split) -> None:
        self.rng = random.Random(f"{split} {seed}")
        self.split = split
        self._used: set[str] = set()
        self._recent: dict[str, deque[str]] = {}

    def person(self) -> str:
        """Return a first name and a family name."""
        return f"{self.first_name()} {self._name(FAMILY_ENDS)}"

    def first_name(self) -> str:
        """Return a first name."""
        return self._name(PERSON_ENDS)

    def town(self) -> str:
        """Return the name of a town."""
        return self._name(TOWN_ENDS)

    def street(self) -> str:
        """Return the name of a street."""
        return f"{self._name(TOWN_ENDS)} {self.rng.choice(STREET_SORTS)}"

    def company(self) -> str:
        """Return the name of a company."""
        return f"{self._name(FAMILY_ENDS)} {self.rng.choice(COMPANY_SORTS)}"

    def product(self) -> str:
        """Return the name of a product with a number."""
        return f"{self._name(PRODUCT_ENDS)} {self.rng.randrange(2, 90) * 10}"

    def number(self, digits: int) -> str:
        """Return a number of `digits` digits that does not begin with 0."""
        return self._fresh(lambda: str(self.rng.randrange(10 ** (digits - 1), 10**digits)))

    def day(self) -> str:
        """Return a day of the year."""
        return self._choose("day", [f"{day} {month}" for month in MONTHS for day in range(1, 29)])

    def dish(self) -> str:
        """Return a dish."""
        return self._choose("dish", [f"{style} {dish}" for style in DISH_STYLES for dish in DISHES])

    def allergy(self) -> str:
        """Return a substance that people are allergic to."""
        return self._choose("allergy", ALLERGIES)

    def instrument(self) -> str:
        """Return a musical instrument."""
        return self._choose("instrument", [f"{voice} {name}" for voice in VOICES for name in INSTRUMENTS])

    def _choose(self, sort: str, values: Sequence[str]) -> str:
        """Return a value of the split that is not among the last NOT_AGAIN of its sort."""
        recent = self._recent.setdefault(sort, deque(maxlen=NOT_AGAIN))
        value = self.rng.choice([value for value in values if in_split(value, self.split) and value not in recent])
        recent.append(value)
        return value

    def _name(self, ends: Sequence[str]) -> str:
        return self._fresh(lambda: self.rng.choice(STARTS) + self.rng.choice(MIDDLES) + self.rng.choice(ends))

    def _fresh(self, draw: Callable[[], str]) -> str:
        """Return a value of the split that was not drawn before. Raises ValueError if it finds none."""
        for _ in range(MAX_DRAWS):
            if (value := draw()) not in self._used and in_split(value, self.split):
                self._used.add(value)
                return value
        raise ValueError(f"the split {self.split} has too few names")
