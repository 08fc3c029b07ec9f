"""The Llama family on a CPU, decoded by few large operations instead of transformers' many small ones.

The layers are those of models/llama.py, over weights packed for the CPU and a cache written in place (row_cache.py);
how tokens attend is row_attention.py's. No padding is computed: prompts stand one after the other. Before it serves,
selfcheck.py compares it with transformers' own forward; every other model is run by runner.py.

Suffixes: N tokens, D hidden size, B rows, H heads, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.generator.engine import StagedPatches, StagedWeights
from trimtab.generator.local.blocks import BLOCK, padded
from trimtab.generator.local.live_weights import LiveWeights, overwrite, pieces
from trimtab.generator.local.row_attention import Attend, RowAttention, Span, side_by_side
from trimtab.generator.local.row_cache import RowCache
from trimtab.models.llama import LlamaFormula
from trimtab.models.llama_weights import LlamaWeights, Packer

PIECE = 2**20
"""Elements of a new version that are copied, or overwritten, in one piece."""
SCATTERED = 4
"""What overwriting a single element takes, in elements copied in a row."""
NONE = np.zeros(0, dtype=np.int64)
"""No live rows."""


class LlamaRunner(LiveWeights):
    """Runs the model on the thread that does model work; see `runners.Runner`.

    Args:
        deterministic: not one bit of a row's logits depends on the other rows (blocks.py); slower.
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int, deterministic: bool = False) -> None:
        super().__init__(model)
        self.max_rows = max_rows
        self.takes_pieces = True
        self._formula = LlamaFormula(model)
        self._deterministic = deterministic
        self._block = BLOCK if deterministic else None
        self._coming: tuple[dict[str, torch.Tensor], Packer] | None = None
        self._retired: list[object] = []
        live = model.state_dict()
        packer = Packer(live.get, model.config.num_hidden_layers, self._formula.shape.head_dim, block=self._block)
        for _ in packer.pieces():
            pass
        self._weights: LlamaWeights = packer.weights()
        self.reset()

    def reset(self) -> None:
        """Begin with an empty cache."""
        shape = self._formula.shape
        layers = len(self._weights.layers)
        self.cache = RowCache(layers, shape.key_heads, shape.head_dim, self.max_rows, shape.dtype)
        self._attention = RowAttention(self.cache, shape, apart=self._deterministic)

    @torch.inference_mode(False)  # a parameter cannot take a tensor made in inference mode
    @torch.no_grad()
    def prepare(self, staged: StagedWeights | StagedPatches) -> Iterator[int]:
        """Pack the new version's weights beside those that serve; see `LiveWeights.prepare`."""
        live = self.model.state_dict(keep_vars=True)
        self._coming = None
        coming: dict[str, torch.Tensor] = {}
        if isinstance(staged, StagedPatches):
            patched: dict[int, torch.Tensor] = {}
            for patch in staged.patches:
                parameter = live[patch.name]
                if id(parameter) not in patched:
                    copied = patched[id(parameter)] = torch.empty_like(parameter.detach())
                    parts = zip(copied.view(-1).split(PIECE), parameter.detach().view(-1).split(PIECE), strict=True)
                    for target, source in parts:
                        yield target.copy_(source).numel()
                for part in pieces(patch, PIECE):
                    overwrite(patched[id(parameter)], part)
                    yield SCATTERED * len(part.positions)
            # By the parameter, not by the name: a tied head has the embedding's.
            coming = {name: patched[id(of)] for name, of in live.items() if id(of) in patched}
        else:
            coming = {name: tensor.detach().to(live[name].dtype) for name, tensor in staged.tensors.items()}
        now = {name: tensor.detach() for name, tensor in live.items()} | coming
        packer = Packer(now.get, len(self._weights.layers), self._formula.shape.head_dim, block=self._block)
        yield from packer.pieces()
        self._coming = coming, packer

    def take(self, staged: StagedWeights | StagedPatches) -> None:
        """Change to the version that was prepared: nothing is copied, and nothing freed until later steps."""
        assert self._coming is not None, "prepare comes first"
        (coming, packer), self._coming = self._coming, None
        live = self.model.state_dict(keep_vars=True)
        self._retired += [*self._weights.layers, self._weights.head]
        for name, tensor in coming.items():
            before, live[name].data = live[name].data, tensor
            if isinstance(staged, StagedWeights):
                staged.tensors[name] = before
            else:
                self._retired.append(before)
        self._weights = packer.weights()

    def keep(self, survivors: Sequence[int], longest: int) -> None:
        """Keep rows `survivors`, in that order, as rows 0, 1, ...; the longest of them has `longest` tokens."""
        moves = [(source, row) for row, source in enumerate(survivors) if source != row]
        self.cache.copy([source for source, _ in moves], [row for _, row in moves], longest)

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what rows hold, numbers that are not finite too."""
        self.cache.clear(rows)

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[np.ndarray], *, first_row: int, copies: Sequence[int] = ()) -> torch.Tensor:
        """Compute `sequences` (int32 ids) into the rows from `first_row` on; float32 logits [rows written, V].

        `copies[i]` rows are written for sequence i (one each by default).
        """
        return self._compute(NONE, NONE, sequences, first_row, copies)

    @torch.inference_mode()
    def extend(self, token_ids: np.ndarray, *, row: int, start: int, copies: int = 1) -> torch.Tensor:
        """Compute the next tokens of a row that holds `start` of them; float32 logits [copies, V] of the last.

        With copies the rows behind are filled as this one.
        """
        end = start + len(token_ids)
        self.cache.reserve(row + copies, end)
        logits_1V = self._extend([Span(row, start, token_ids)])
        self.cache.copy([row] * (copies - 1), list(range(row + 1, row + copies)), end)
        return logits_1V.expand(copies, -1)

    @torch.inference_mode()
    def decode(
        self,
        tokens_B: np.ndarray,
        lengths_B: np.ndarray,
        prompts: Sequence[np.ndarray] = (),
        copies: Sequence[int] = (),
    ) -> torch.Tensor:
        """One forward of one token a live row, whose past is `lengths_B` tokens long, and of `prompts` behind them.

        Float32 logits [B and the rows written as by `prefill`, V].
        """
        if self._retired:
            self._retired.pop()
        return self._compute(tokens_B, lengths_B, prompts, len(tokens_B), copies)

    def _compute(
        self,
        tokens_B: np.ndarray,
        lengths_B: np.ndarray,
        prompts: Sequence[np.ndarray],
        first_row: int,
        copies: Sequence[int],
    ) -> torch.Tensor:
        """The logits of `decode`, with the prompts' rows from `first_row` on."""
        counts = list(copies) or [1] * len(prompts)
        firsts = first_row + np.cumsum([0, *counts])
        longest = max((len(prompt) for prompt in prompts), default=0)
        self.cache.reserve(int(firsts[-1]), max(longest, int(lengths_B.max(initial=-1)) + 1))
        spans = [Span(int(row), 0, ids) for row, ids in zip(firsts, prompts, strict=False)]
        logits_BV = self._extend(spans, tokens_B, lengths_B)
        sources = np.repeat(np.arange(len(prompts)), counts)
        rows = first_row + np.arange(len(sources))
        extra = np.flatnonzero(firsts[sources] != rows)
        if len(extra) == 0:
            return logits_BV
        self.cache.copy(firsts[sources[extra]].tolist(), rows[extra].tolist(), longest)
        return logits_BV[torch.from_numpy(np.concatenate([np.arange(len(tokens_B)), len(tokens_B) + sources]))]

    def _extend(self, spans: Sequence[Span], tokens_B: np.ndarray = NONE, lengths_B: np.ndarray = NONE) -> torch.Tensor:
        """One token a live row and spans, those of one shape together; float32 logits of each one's last token."""
        live = len(tokens_B)
        if not spans:
            return self._forward(tokens_B, lengths_B, self._attention.to_past(lengths_B))
        order = sorted(range(len(spans)), key=lambda i: (spans[i].start, len(spans[i].token_ids)))
        inside = [spans[i] for i in order]
        attend = self._attention.in_spans(inside)
        if live:
            attend = side_by_side(live, self._attention.to_past(lengths_B), attend)
        tokens_N = np.concatenate([tokens_B, *(span.token_ids for span in inside)])
        positions_N = np.concatenate([lengths_B, *(np.arange(len(span.token_ids)) + span.start for span in inside)])
        last_B = np.cumsum([live, *(len(span.token_ids) for span in inside)])[1:] - 1
        ends_B = np.concatenate([np.arange(live), last_B[np.argsort(order)]])
        return self._forward(tokens_N, positions_N, attend, torch.from_numpy(ends_B))

    def _forward(
        self, tokens_N: np.ndarray, positions_N: np.ndarray, attend: Attend, wanted_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits of all tokens, or of those at `wanted_B`."""
        weights, formula, count = self._weights, self._formula, len(tokens_N)
        rows_for = weights.layers[0].qkv.rows_for
        behind = (0, rows_for(count) - count)  # computed in vain
        tokens_N, positions_N = np.pad(tokens_N, behind), np.pad(positions_N, behind)
        turns_N = formula.turns(positions_N, weights.embedding_VD)
        hidden_ND = functional.embedding(torch.from_numpy(tokens_N.astype(np.int64)), weights.embedding_VD)
        for index, layer in enumerate(weights.layers):
            qkv = formula.before(layer, hidden_ND, turns_N)[:count]
            attended_ND = attend(index, qkv)
            if wanted_B is not None and index == len(weights.layers) - 1:
                attended_ND, hidden_ND, count = attended_ND[wanted_B], hidden_ND[wanted_B], len(wanted_B)
            attended_ND, hidden_ND = (padded(rows, rows_for(count)) for rows in (attended_ND, hidden_ND))
            hidden_ND = formula.after(layer, attended_ND, hidden_ND)
        assert weights.head is not None
        return weights.head(formula.norm(hidden_ND, weights.norm))[:count].float()
