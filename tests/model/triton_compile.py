"""Compile every Triton kernel for an H100, at the sizes of the default base and memory, and print the names.

The compiler needs no GPU, and it refuses types and shapes that the interpreter accepts.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.decode import triton_attention
from model.memory.lexical import triton_backend

H100 = GPUTarget("cuda", 90, 32)
ROWS = {"ages": "*i32", "tokens": "*i32", "ngram_hashes": "*i16", "keys": "*i8"}
CELLS = {"P": 50, "R": 3, "D": 64, "P2": 64, "D2": 64}
HEADS = {"H_KV": 3, "G": 3, "D": 64, "G2": 4, "D2": 64, "PAGE": 32}
PAGES = (
    dict.fromkeys(("q", "k", "v", "keys", "values", "out"), "*bf16")
    | dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "table_size", "window"), "i32")
    | {"tables": "*i32", "sequences": "*i64", "positions": "*i64", "scale": "fp32"}
)
KERNELS = {
    triton_backend._match_rows: (
        ROWS
        | {"tables": "*i32", "session": "*i64", "cells": "*i64", "query": "*fp32", "context": "*i16"}
        | {"out_tokens": "*i64", "out_cosines": "*fp32", "out_ngram_matches": "*i64", "out_missing": "*u8"}
        | {"table_size": "i32", "step": "fp32"},
        CELLS,
    ),
    triton_backend._write: (
        ROWS
        | {"old": "*i32", "new": "*i32", "at": "*i64", "new_keys": "*i8", "new_ngram_hashes": "*i16", "targets": "*i64"}
        | {"n": "i32"},
        CELLS,
    ),
    triton_attention._store_paged_kv: (PAGES, HEADS),
    triton_attention._paged_attention: (PAGES, HEADS),
}

if __name__ == "__main__":
    for kernel, (arguments, sizes) in KERNELS.items():
        names = kernel.arg_names
        signature = {name: "constexpr" if name in sizes else arguments[name] for name in names}
        constants = {(at,): sizes[name] for at, name in enumerate(names) if name in sizes}
        triton.compile(ASTSource(kernel, signature, constants), H100)
        print(kernel.__name__)
