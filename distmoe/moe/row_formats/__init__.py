"""In what form rows travel: to the experts, and their partial sums home. See docs/design.md, "The
dtype of travelling rows".

A rank packs the rows of its tokens once a pass. Packed rows are gathered, sent, and at level `node`
passed on as they are, and unpacked where they are computed with. Rows that never travel are packed
and unpacked too, so that the result does not depend on where an expert lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distmoe.moe.row_formats.plain import Bf16Rows, ComputedRows, PlainRows
from distmoe.registry import ROW_FORMATS


class RowFormat(Protocol):
    """One form. Row by row: a packed row is contiguous, and says nothing of other rows."""

    def row_bytes(self, hidden: int, itemsize: int) -> int:
        """Of a packed row of ``hidden`` values that are computed with ``itemsize`` bytes."""
        ...

    def pack(self, v_TH: Tensor) -> Tensor:
        """[T, W], contiguous, of another dtype than ``v_TH``, or else the same values."""
        ...

    def unpack(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None = None) -> None:
        """Into contiguous rows of the dtype that is computed with. ``token_R`` int64: the packed
        row of every row of out; None: the same."""
        ...


@dataclass(frozen=True)
class PackedRows:
    """The rows of a rank's tokens as they travel. ``hidden``, ``dtype``: of the rows unpacked;
    ``sum_dtype``: of the partial sums that come home for them."""

    format: RowFormat
    packed_TW: Tensor
    hidden: int
    dtype: torch.dtype
    sum_dtype: torch.dtype

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to unpack."""
        return self.packed_TW.dtype == self.dtype

    def new_rows(self, num_rows: int) -> Tensor:
        """[R, H], for unpacked rows."""
        return self.packed_TW.new_empty(num_rows, self.hidden, dtype=self.dtype)

    def new_packed(self, num_rows: int) -> Tensor:
        """[R, W], for rows that arrive."""
        return self.packed_TW.new_empty(num_rows, self.packed_TW.shape[1])

    def new_sums(self, num_rows: int) -> Tensor:
        """[U, H], for partial sums that come home."""
        return self.packed_TW.new_empty(num_rows, self.hidden, dtype=self.sum_dtype)

    def gather(self, token: Tensor) -> Tensor:
        """Packed rows of the tokens, int64."""
        return self.packed_TW.index_select(0, token)

    def place(self, token_R: Tensor, out_RH: Tensor) -> None:
        """Unpacked rows of the tokens, int64, that stay on this rank."""
        if self.is_plain:
            torch.index_select(self.packed_TW, 0, token_R, out=out_RH)
        else:
            self.format.unpack(self.packed_TW, out_RH, token_R)

    def unpacked(self) -> Tensor:
        """All rows, [T, H]; the packed ones themselves if there is nothing to unpack."""
        if self.is_plain:
            return self.packed_TW
        rows_TH = self.new_rows(len(self.packed_TW))
        self.format.unpack(self.packed_TW, rows_TH)
        return rows_TH


class RowDtypes(Protocol):
    """What asks for formats; values as in `DispatchConfig`."""

    @property
    def row_dtype(self) -> str: ...

    @property
    def sum_dtype(self) -> str: ...


@dataclass(frozen=True)
class TravelFormats:
    """Of a layer: ``rows`` to the experts, x in the forward and dy in the backward, and partial
    ``sums`` home, y and dx."""

    rows: RowFormat = ComputedRows()
    sums: PlainRows = ComputedRows()

    @staticmethod
    def of(asked: RowDtypes) -> TravelFormats:
        """What a `DispatchConfig`, for one, asks for."""
        sums = Bf16Rows() if asked.sum_dtype == "bf16" else ComputedRows()
        return TravelFormats(ROW_FORMATS.load(asked.row_dtype)(), sums)

    def pack(self, v_TH: Tensor) -> PackedRows:
        """The rows of a pass."""
        return PackedRows(
            self.rows,
            self.rows.pack(v_TH),
            hidden=v_TH.shape[1],
            dtype=v_TH.dtype,
            sum_dtype=self.sums.dtype(v_TH.dtype),
        )
