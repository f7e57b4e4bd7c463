// SPDX-License-Identifier: Apache-2.0
// The LZ4 block format (lz4_Block_format.md), both ways: what leaves memory for a scratch file is compressed. Of our own,
// because the engine links no library: a wheel is built with gcc alone.
#ifndef UF_LZ4_H
#define UF_LZ4_H

#include <stddef.h>
#include <stdint.h>

// Returns the compressed length, 0 if it does not fit into `capacity`. `n` is at most 2 GiB.
size_t uf_lz4_compress(const void *src, size_t n, void *dst, size_t capacity);
// Returns the expanded length, or -1 where `src` is not a block that fits into `capacity`. Reads and writes nothing beyond.
ptrdiff_t uf_lz4_expand(const void *src, size_t n, void *dst, size_t capacity);

#endif
