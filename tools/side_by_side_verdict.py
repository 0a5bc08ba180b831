"""Which answer a language model's reply prefers: free text -> A, B or same; None where it is not clear."""

from __future__ import annotations

import re
from collections.abc import Iterator

_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL)
_SIDE = r"(A|B|(?i:same|tie))(?![A-Za-z0-9'])"
# "Answer: B", "**Verdict:** A", "the better answer is A", "Verdict: A or B? B", and the same in Chinese
_NAMED = re.compile(
    r"(?i:answer|verdict|choice|winner|judge?ment|答案|结论|选择)[\s*]*(?::|\uff1a|\bis\b|是|为)\W*(?i:(?:answer|the|a)\s+)*"
    r"(?:A\s*(?:or|/|,)\s*B\b[^?\n]{0,20}\?\W*)?"  # the question, said again
    + _SIDE
    + r"(?!\s*(?:/|or\b|as\b|and\s+(?:answer\s+)?[AB]\s+are\b))"
)
# a line that says nothing else, such as "[[A]]"
_BARE = re.compile(r"^[\W_]*(?i:(?:answer\s+)?(A|B|same|tie))[\W_]*$", re.MULTILINE)
# a reply that begins with it: "B because A is wrong", "A. It is shorter"
_BECAUSE = re.compile(r"\A\W*" + _SIDE + r"\W{0,3}?\s*,?\s*(?i:because|since|as)\b")
_FIRST = re.compile(r"\A\W*" + _SIDE + r"\W{0,3}?[.;!(\u2013\u2014-]")
# the names of the answers; an A before a word that does not go on about it is an article
_NAME = re.compile(
    r"(?<![A-Za-z0-9'])(A|B)(?![A-Za-z0-9'])(?!(?<=A)\s+(?!(?:is|was|does|has|and|or|but|while|though)\b)[a-z])"
)
# "A is clearly better", "I prefer answer B", and the same in Chinese
_BETTER = re.compile(
    r"(?<![A-Za-z0-9'])(A|B)[*\])\"']*\s+(?i:is|was)\s+(?:(?i:\w+ly|much|far|the|a\s+(?:bit|little))\s+)*"
    r"(?i:better|best|preferred|preferable|superior|more\s+\w+)"
    r"|(?i:prefer|choose|pick)\s+(?i:answer\s+)?(A|B)(?![A-Za-z0-9'])"
    r"|(?<![A-Za-z0-9])(A|B)\s*(?:的?回答)?(?:明显|略|稍)?(?:更好|更佳|较好)"
)
_EQUAL = re.compile(
    r"(?i:\bequally\s+\w+|\bare\s+(?:\w+ly\s+|about\s+)?(?:the\s+same|equal|equivalent|tied)\b|\bit(?:'s|\s+is)\s+a\s+tie\b"
    r"|\bneither\b.{0,40}\bbetter\b)|一样好|不相上下|平局"
)
_CLAUSE = re.compile(r"[.,;!?\n\uff0c\u3002\uff1b\uff01\uff1f]")
_DOUBT = re.compile(r"\b(?:not|neither|nor|or|whether|if|unless|why|which)\b|n't|不|如果|是否|若", re.IGNORECASE)


def verdict_of(reply: str) -> str | None:
    """A, B or same: what a reply says, its reasoning apart, in the clearest of its ways; None where it contradicts.

    A reply that ends within its reasoning says nothing.
    """
    text = _THOUGHT.sub("", reply)
    if "<think" in text:
        return None
    ways = (_NAMED, _BARE, _BECAUSE)
    for found in (*(way.finditer(text) for way in ways), _first(text), _preferences(text), _EQUAL.finditer(text)):
        sides = {_side(match) for match in found}
        if len(sides) == 1:
            return sides.pop()
    return None


def _side(match: re.Match[str]) -> str:
    said = next(filter(None, match.groups()), "").upper()
    return said if said in ("A", "B") else "same"


def _first(text: str) -> Iterator[re.Match[str]]:
    """What the reply begins with, unless it goes on to the other answer: "A. Short and wrong. B. Longer and right"."""
    first = _FIRST.match(text)
    if first and (_side(first) == "same" or not set(_NAME.findall(text[first.end() :])) - {_side(first)}):
        yield first


def _preferences(text: str) -> Iterator[re.Match[str]]:
    """Where a clause says that one is better, and does not doubt it before."""
    for clause in _CLAUSE.split(text):
        for match in _BETTER.finditer(clause):
            if not _DOUBT.search(clause[: match.start()]):
                yield match
