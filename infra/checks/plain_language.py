"""Names and docstrings that say nothing: the share of each stays below a falling allowance.

`python infra/checks/plain_language.py` prints both shares and fails when a share is above its
allowance; `--list` prints each place. A name such as `one` or `found` sends a reader to look for
the noun behind the name; so does a pronoun in a docstring. Lower an allowance whenever the share
has fallen. Knows Python source; knows nothing of the purpose of the code.
"""

from __future__ import annotations

import argparse
import ast
import io
import keyword
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "router", "shards", "kernels")
EMPTY_NAMES = frozenset({"one", "found", "told", "asked", "due", "held", "what", "whose"})
PRONOUNS = frozenset(
    {
        "it", "its", "they", "them", "their", "one", "ones", "these", "those", "such", "he", "she",
        "who", "whom", "whose", "what", "whatever", "which", "whichever", "whoever", "something",
        "anything", "everything", "somebody", "anybody", "nobody", "everybody",
    }
)  # fmt: skip
MOST_EMPTY_NAMES = 0.001
"""Largest share of empty names among all names."""
MOST_PRONOUNS = 0.03
"""Largest share of pronouns among all words of docstrings."""


def sources() -> list[Path]:
    """The product's own Python files; generated ones are left out."""
    files = (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))
    return [file for file in files if "_pb2" not in file.name]


def names(text: str) -> list[tuple[str, int]]:
    """Each name in a source with its line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.string, token.start[0])
        for token in tokens
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
    ]


def docstrings(text: str) -> list[tuple[str, int]]:
    """Each docstring of a source with its line, those of constants included."""
    strings = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                strings.append((node.value.value, node.lineno))
    return strings


def words(text: str) -> list[str]:
    """Plain words of a docstring, in lower case; code between backticks is left out."""
    return re.findall(r"[a-z']+", re.sub(r"`[^`]*`", " ", text).lower())


def main() -> None:
    """Print the shares; exit with 1 when one is above its allowance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name each place")
    parser.add_argument("folders", nargs="*", help="look at files below these alone")
    given = parser.parse_args()
    num_names = num_words = 0
    empty: Counter[str] = Counter()
    pronouns: Counter[str] = Counter()
    for file in sources():
        shown = str(file.relative_to(ROOT))
        if given.folders and not shown.startswith(tuple(given.folders)):
            continue
        text = file.read_text()
        for name, line in names(text):
            num_names += 1
            if name in EMPTY_NAMES:
                empty[name] += 1
                if given.list:
                    print(f"{shown}:{line}: name `{name}`")
        for docstring, line in docstrings(text):
            for word in words(docstring):
                num_words += 1
                if word in PRONOUNS:
                    pronouns[word] += 1
                    if given.list:
                        print(f"{shown}:{line}: word `{word}`")
    failed = False
    for kind, counts, total, most in (
        ("names", empty, num_names, MOST_EMPTY_NAMES),
        ("docstring words", pronouns, num_words, MOST_PRONOUNS),
    ):
        share = counts.total() / max(total, 1)
        failed |= share > most
        common = ", ".join(f"{word} {count}" for word, count in counts.most_common(8))
        print(f"{counts.total()} of {total} {kind} = {share:.2%}, allowed {most:.2%}: {common}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
