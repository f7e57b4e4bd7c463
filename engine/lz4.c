// SPDX-License-Identifier: Apache-2.0
#include "lz4.h"

#include <string.h>

// Format: each sequence is a token (literals << 4 | match - 4), more length bytes while they are 255, the literals, the
// match's distance (two bytes, little-endian), more length bytes. The last five bytes are literals, and the last match
// begins at least twelve bytes before the end.
enum { MIN_MATCH = 4, LAST_LITERALS = 5, MATCH_LIMIT = 12, HASH_BITS = 12, MOST_DISTANCE = 65535 };

static uint32_t load32(const uint8_t *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static uint8_t *put_length(uint8_t *out, size_t n)
{
	for (; n >= 255; n -= 255)
		*out++ = 255;
	*out++ = (uint8_t)n;
	return out;
}

// One sequence; `match` 0 ends the block. NULL if it may not fit.
static uint8_t *put(uint8_t *out, const uint8_t *end, const uint8_t *literals, size_t n, size_t distance, size_t match)
{
	if ((size_t)(end - out) < 1 + n / 255 + 1 + n + 2 + match / 255 + 1)
		return NULL;
	size_t extra = match ? match - MIN_MATCH : 0;
	*out++ = (uint8_t)((n < 15 ? n : 15) << 4 | (extra < 15 ? extra : 15));
	if (n >= 15)
		out = put_length(out, n - 15);
	memcpy(out, literals, n);
	out += n;
	if (!match)
		return out;
	*out++ = (uint8_t)distance;
	*out++ = (uint8_t)(distance >> 8);
	return extra >= 15 ? put_length(out, extra - 15) : out;
}

size_t uf_lz4_compress(const void *src, size_t n, void *dst, size_t capacity)
{
	uint32_t table[1 << HASH_BITS] = {0}; // position + 1
	const uint8_t *base = src, *end = base + n, *at = base, *literals = base;
	uint8_t *out = dst, *out_end = out + capacity;
	size_t misses = 0;
	while (n > MATCH_LIMIT && at < end - MATCH_LIMIT) {
		uint32_t v = load32(at), *slot = &table[v * 2654435761u >> (32 - HASH_BITS)];
		const uint8_t *found = base + *slot - 1;
		if (!*slot || at - found > MOST_DISTANCE || load32(found) != v) {
			*slot = (uint32_t)(at - base) + 1;
			at += 1 + (misses++ >> 6); // what does not compress is passed over faster and faster
			continue;
		}
		*slot = (uint32_t)(at - base) + 1;
		misses = 0;
		const uint8_t *a = at + MIN_MATCH, *b = found + MIN_MATCH, *last = end - LAST_LITERALS;
		while (a < last && *a == *b) {
			a++;
			b++;
		}
		out = put(out, out_end, literals, (size_t)(at - literals), (size_t)(at - found), (size_t)(a - at));
		if (!out)
			return 0;
		at = literals = a;
	}
	out = put(out, out_end, literals, (size_t)(end - literals), 0, 0);
	return out ? (size_t)(out - (uint8_t *)dst) : 0;
}

// Adds the length bytes that follow a 15. False at the end of the input.
static int get_length(const uint8_t **in, const uint8_t *end, size_t *n)
{
	uint8_t more;
	do {
		if (*in == end)
			return 0;
		more = *(*in)++;
		*n += more;
	} while (more == 255);
	return 1;
}

ptrdiff_t uf_lz4_expand(const void *src, size_t n, void *dst, size_t capacity)
{
	const uint8_t *in = src, *end = in + n;
	uint8_t *base = dst, *out = base, *out_end = base + capacity;
	while (in < end) {
		uint8_t token = *in++;
		size_t literals = token >> 4, match = token & 15;
		if (literals == 15 && !get_length(&in, end, &literals))
			return -1;
		if (literals > (size_t)(end - in) || literals > (size_t)(out_end - out))
			return -1;
		memcpy(out, in, literals);
		in += literals;
		out += literals;
		if (in == end)
			return out - base;
		if (end - in < 2)
			return -1;
		size_t distance = in[0] | (size_t)in[1] << 8;
		in += 2;
		if (match == 15 && !get_length(&in, end, &match))
			return -1;
		match += MIN_MATCH;
		if (!distance || distance > (size_t)(out - base) || match > (size_t)(out_end - out))
			return -1;
		const uint8_t *from = out - distance;
		if (distance >= match) {
			memcpy(out, from, match);
			out += match;
		} else {
			while (match--) // it overlaps itself: a pattern that repeats
				*out++ = *from++;
		}
	}
	return -1;
}
