"""Names in any script within pictures: in a font that has their characters, or as numbers, never as empty boxes."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from matplotlib import rc_context, rcParams
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from transformers.utils import logging

logger = logging.get_logger(__name__)

NOT_READABLE = "\N{REPLACEMENT CHARACTER}"
# has a sign for every character, which says of which script it is
NO_LETTERS = "Last Resort"
NORMAL_WEIGHT = 400


@contextmanager
def lettering(texts: Iterable[str]) -> Iterator[None]:
    """Within it matplotlib writes these texts in its own font, and what that lacks in installed ones that have it."""
    with rc_context({"font.family": [*rcParams["font.family"], *fonts_for("".join(map(str, texts)))]}):
        yield


def written(text: str) -> str:
    """A text as matplotlib takes it: in one line, without formulas, and without characters that no font has."""
    lacking = _lacking(text)
    shown = "".join(NOT_READABLE if character in lacking else character for character in " ".join(text.split()))
    return shown.replace("$", r"\$")


def title_weight(text: str) -> str:
    """Bold, but for texts in other fonts than matplotlib's own: their bold ones may have fewer characters."""
    return "normal" if fonts_for(text) else "bold"


def written_names(class_names: Sequence[str]) -> list[str]:
    """The names of classes as matplotlib takes them; those that no installed font can show are numbers, said once."""
    lacking = _lacking("".join(map(str, class_names)))
    unreadable = [index for index, name in enumerate(class_names) if lacking & set(str(name))]
    if unreadable:
        first = unreadable[0]
        logger.warning_once(
            f"{len(unreadable)} of {len(class_names)} class names have characters of which no installed font has a "
            f"picture, the first {class_names[first]!r}: pictures call it 'class {first}'. Install a font with them, "
            "such as Noto Sans CJK (on Debian and Ubuntu fonts-noto-cjk), and draw the pictures again."
        )
    numbers = set(unreadable)
    return [f"class {index}" if index in numbers else written(str(name)) for index, name in enumerate(class_names)]


def fonts_for(text: str) -> list[str]:
    """The names of installed fonts that together have what matplotlib's own lacks, as far as any have it."""
    return list(_fonts_for(frozenset(_shown(text) - _own_characters())))


@cache
def _fonts_for(missing: frozenset[str]) -> tuple[str, ...]:
    chosen: list[str] = []
    had = {name: missing & _characters_in(file) for name, file in _other_fonts().items()} if missing else {}
    while missing:
        name = max(had, key=lambda font: len(missing & had[font]), default=None)
        if name is None or not missing & had[name]:
            break
        chosen.append(name)
        missing -= had[name]
    return tuple(chosen)


def _lacking(text: str) -> set[str]:
    """The characters that no installed font has."""
    others = (_characters_in(_other_fonts()[name]) for name in fonts_for(text))
    return _shown(text).difference(_own_characters(), *others)


def _shown(text: str) -> set[str]:
    """The characters that are drawn: neither spaces nor control characters."""
    return {character for character in text if not character.isspace() and unicodedata.category(character) != "Cc"}


def _own_characters() -> frozenset[str]:
    """The characters of the font that matplotlib writes in by default."""
    return _characters_in(findfont(FontProperties()))


@cache
def _other_fonts() -> dict[str, str]:
    """The files of installed fonts that are upright and of normal weight, by their names, in an order of their own."""
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname))
    return {
        font.name: font.fname
        for font in fonts
        if font.style == "normal" and font.weight == NORMAL_WEIGHT and NO_LETTERS not in font.name
    }


@cache
def _characters_in(file: str) -> frozenset[str]:
    """The characters of a font's file; none of one that has pictures of a fixed size, or is damaged."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):  # of the system, and of FreeType
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
