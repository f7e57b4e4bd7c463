// SPDX-License-Identifier: Apache-2.0
// Mappings for large arrays, and the few that are kept for the next one.
#ifndef UF_ARRAY_MAPS_H
#define UF_ARRAY_MAPS_H

#include "arrays.h"

struct uf_array_map {
	uintptr_t address;
	size_t mapped; // 0: none
};

// Whole pages.
size_t uf_array_pages_up(size_t size);

// Zeros, at a page's border, or at a huge page's if it is so large that huge pages can be in it. False: no memory.
bool uf_array_map(size_t length, enum uf_array_pages pages, struct uf_array_map *ret);
// Keeps errno, as `free` does.
void uf_array_unmap(struct uf_array_map map);

// The spares. Their callers see to it that they call one at a time.
// Gives out one that is at least as long, and by an eighth at most longer; what is in it is arbitrary. False: there is none.
bool uf_array_spare_take(size_t length, struct uf_array_map *ret);
// Keeps it, in place of older ones if there are too many. False: it is too large, and stays the caller's.
bool uf_array_spare_keep(struct uf_array_map map);
void uf_array_spares_end(void);
uint64_t uf_array_spare_bytes(void);

#endif
