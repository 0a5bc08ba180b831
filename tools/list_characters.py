"""Lists the Chinese characters of old two-byte character sets, in the order of their codes, each once: one a line.

For `megatron-xy vocab extend --characters`: GB2312's 6,763 are the simplified ones by how common they are, Big5 adds
the traditional ones.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xy.data.encoding.vocabulary import HAN
from megatron_xy.errors import with_exit_code
from megatron_xy.storage import write_text

CHARACTER_SETS = ("gb2312", "big5")


@with_exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("character_sets", nargs="+", choices=CHARACTER_SETS, metavar="|".join(CHARACTER_SETS))
    parser.add_argument("--output", type=Path, required=True, help="the text file to write")
    options = parser.parse_args(arguments)
    characters = dict.fromkeys(itertools.chain.from_iterable(map(characters_of, options.character_sets)))
    write_text(options.output, "".join(f"{character}\n" for character in characters))
    print(f"wrote {options.output}: {len(characters)} characters")


def characters_of(character_set: str) -> Iterator[str]:
    """The Chinese characters that have a two-byte code, by that code."""
    for code in itertools.product(range(0x81, 0xFF), range(0x40, 0xFF)):
        character = bytes(code).decode(character_set, errors="ignore")
        if re.fullmatch(f"[{HAN}]", character):
            yield character


if __name__ == "__main__":
    sys.exit(main())
