"""Earlier outputs of tenants, bounded: what agents and templates say again.

Each tenant has a text of its own, so that nobody can infer another's outputs. The older half
of a text is dropped when it is full; the tenant that was idle longest loses its text first.

Knows tokens and tenants; knows nothing of sequences.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

from arriero.shards.engine.speculation.draft_length import Acceptance
from arriero.shards.engine.speculation.token_index import END_OF_TEXT, TokenIndex

BYTES_PER_TOKEN = 64
"""A token and its places in the index, an upper estimate."""


Tenant = tuple[str, bytes]
"""A tenant and the salt of its request: texts of another are never read."""


class Corpus:
    """Outputs of a tenant, one after another, with a separator before and after each.

    Args:
        max_tokens: most tokens.

    Attributes:
        index: index of the text; a new object after old text was dropped.
        acceptance: how often drafts of the tenant's sequences were right.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.index = TokenIndex(array("i"))
        self.acceptance = Acceptance()

    def __len__(self) -> int:
        return len(self.index.tokens)

    def add(self, output: Iterable[int]) -> None:
        """Append an output; drops the older half of a full text."""
        text = array("i", () if len(self) else (END_OF_TEXT,))
        text.extend(output)
        text.append(END_OF_TEXT)
        text = text[-(self._max_tokens // 2) :]
        if len(self) + len(text) > self._max_tokens:
            self.index = TokenIndex(self.index.tokens[-(self._max_tokens // 2) :])
        self.index.tokens.extend(text)
        self.index.extend()


class Corpora:
    """The texts of all tenants.

    Args:
        max_bytes: most bytes of all texts and their indices.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_tokens = max_bytes // BYTES_PER_TOKEN
        self._by_tenant: OrderedDict[Tenant, Corpus] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(corpus) for corpus in self._by_tenant.values())

    def of(self, tenant: Tenant) -> Corpus:
        """The text of a tenant, empty at first."""
        corpus = self._by_tenant.get(tenant)
        if corpus is None:
            corpus = self._by_tenant[tenant] = Corpus(self._max_tokens)
        return corpus

    def add(self, tenant: Tenant, output: Iterable[int]) -> None:
        """Append an output to its tenant's text."""
        self.of(tenant).add(output)
        self._by_tenant.move_to_end(tenant)
        while self.num_tokens > self._max_tokens and len(self._by_tenant) > 1:
            self._by_tenant.popitem(last=False)
