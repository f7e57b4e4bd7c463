// SPDX-License-Identifier: Apache-2.0
// Scratch files: where private changes go when they leave memory.
//
// A scratch file has no name and is sparse. A block lies at its own offset, compressed if that saves at least an eighth,
// and takes as much of the disk as that needs; so there is nothing to allocate and nothing to collect. An entry of
// `spilled` says what is there:
//   0             nothing: the block is in the source
//   bits 0-21     1: the block is zero; else stored bytes + 2, which is the block's length if it is not compressed
//   bits 22-27    which of the memory's scratch files
//   bit 31        it is part of the flush under way (staged)
//
// A fork freezes the current file, for the child reads it from then on, too: both write on in files of their own. A pipe for
// each fork tells when no child of it is left (ended, or another program by exec): then the files may be written again. So a
// program that forks all day has no more files than children alive.
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"
#include "lz4.h"

enum { PIECE = 4096 }; // the file system's unit, for what is said of space in use
#define STORED(entry) ((entry) & 0x3fffffu)
#define FILE_OF(entry) ((entry) >> 22 & 63u)

static uint64_t space(uint32_t entry)
{
	uint64_t stored = STORED(entry);
	return stored < 2 ? 0 : (stored - 2 + PIECE - 1) / PIECE * PIECE;
}

int uf_scratch_create(const struct uf_pager *p, int *ret)
{
	const char *dir = p->scratch_dir;
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
	if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) { // the file system has no O_TMPFILE
		char path[4096];
		int n = snprintf(path, sizeof(path), "%s/userfault-XXXXXX", dir);
		if (n < 0 || (size_t)n >= sizeof(path))
			return -ENAMETOOLONG;
		fd = mkostemp(path, O_CLOEXEC);
		if (fd >= 0)
			unlink(path);
	}
	fd = uf_high_fd(fd);
	if (fd < 0)
		return -errno;
	*ret = fd;
	return 0;
}

// Processes that were forked here since a file held something, by the fork: a bit of `readers` each. Lock held.
static void reap_generations(struct uf_pager *p)
{
	uint64_t gone = 0;
	for (unsigned g = 0; g < UF_GENERATIONS; g++) {
		struct pollfd end = {p->generations[g], POLLIN, 0};
		if (end.fd < 0 || poll(&end, 1, 0) != 1 || !(end.revents & POLLHUP))
			continue;
		close(end.fd);
		p->generations[g] = -1;
		gone |= 1ULL << g;
	}
	for (uint32_t k = 0; gone && k < p->memories_capacity; k++)
		for (unsigned i = 0; p->memories[k] && i < UF_SCRATCHES; i++)
			p->memories[k]->scratch[i].readers &= ~gone;
}

static bool frozen(const struct uf_scratch *file)
{
	return file->readers || file->inherited;
}

// The file that is written now, with its `writers` counted. Without lock.
static int current(struct uf_memory *m, int *index)
{
	struct uf_pager *p = m->pager;
	int err = 0;
	pthread_mutex_lock(&p->lock);
	while (m->scratch_opening)
		uf_wait_changed(p, 10);
	if (m->scratch_now < 0) {
		reap_generations(p);
		for (int i = 0; i < UF_SCRATCHES && m->scratch_now < 0; i++)
			if (m->scratch[i].fd >= 0 && !frozen(&m->scratch[i]))
				m->scratch_now = i;
	}
	if (m->scratch_now < 0) {
		int at = 0, fd = -1;
		while (at < UF_SCRATCHES && m->scratch[at].fd >= 0)
			at++;
		m->scratch_opening = true;
		pthread_mutex_unlock(&p->lock);
		err = at == UF_SCRATCHES ? -ENFILE : uf_scratch_create(p, &fd);
		pthread_mutex_lock(&p->lock);
		m->scratch_opening = false;
		pthread_cond_broadcast(&p->changed);
		if (!err) {
			m->scratch[at] = (struct uf_scratch){.fd = fd};
			m->scratch_now = at;
		}
	}
	*index = m->scratch_now;
	if (!err)
		m->scratch[m->scratch_now].writers++;
	pthread_mutex_unlock(&p->lock);
	return err;
}

static bool all_zero(const char *bytes, size_t n)
{
	return !bytes[0] && !memcmp(bytes, bytes + 1, n - 1);
}

static int write_all(int fd, const char *bytes, size_t n, uint64_t at)
{
	for (size_t done = 0; done < n;) {
		ssize_t r = pwrite(fd, bytes + done, n - done, (off_t)(at + done));
		if (r > 0)
			done += (size_t)r;
		else if (r == 0)
			return -ENOSPC;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int uf_scratch_write(struct uf_slot *s, const char *bytes, struct uf_staging *st)
{
	struct uf_memory *m = s->memory;
	size_t size = uf_block_size(m);
	int index = -1, err = current(m, &index);
	s->file = err ? -1 : index;
	s->begun = 0;
	for (uint64_t i = 0; i < s->count && !err; i++) {
		const char *block = bytes + (i << m->shift);
		uint64_t at = (s->first + i) << m->shift;
		uint32_t entry = 1;
		s->begun = i + 1;
		if (!all_zero(block, size)) {
			size_t n = st->packed ? uf_lz4_compress(block, size, st->packed, size / 8 * 7) : 0;
			err = write_all(m->scratch[index].fd, n ? st->packed : block, n ? n : size, at);
			entry = (uint32_t)(n ? n : size) + 2;
		}
		entry |= (uint32_t)index << 22;
		// What an older, longer version of the block still takes of the file. (A frozen file stays as it is.)
		uint32_t old = atomic_load_explicit(&m->spilled[s->first + i], memory_order_relaxed);
		if (!err && old && FILE_OF(old) == (uint32_t)index && space(old) > space(entry))
			fallocate(m->scratch[index].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(at + space(entry)),
				  (off_t)(space(old) - space(entry)));
		s->entries[i] = entry;
	}
	return err;
}

// Nothing is left in a file that is not written any more: nobody reads it, for who reads owns a block that is in it.
static void close_if_empty(struct uf_memory *m, unsigned index)
{
	struct uf_scratch *file = &m->scratch[index];
	if (file->blocks || file->writers || (int)index == m->scratch_now)
		return;
	close(file->fd);
	*file = (struct uf_scratch){.fd = -1};
}

static void forget(struct uf_memory *m, uint64_t block)
{
	uint32_t old = atomic_load_explicit(&m->spilled[block], memory_order_relaxed);
	if (!old)
		return;
	m->stats.bytes_scratch -= space(old);
	atomic_store_explicit(&m->spilled[block], 0, memory_order_relaxed);
	m->scratch[FILE_OF(old)].blocks--;
	close_if_empty(m, FILE_OF(old));
}

// The write into its file has ended.
static void written(struct uf_slot *s)
{
	if (s->file < 0)
		return;
	s->memory->scratch[s->file].writers--;
	close_if_empty(s->memory, (unsigned)s->file);
	s->file = -1;
}

void uf_scratch_publish(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	for (uint64_t i = 0; i < s->count; i++) {
		m->scratch[FILE_OF(s->entries[i])].blocks++; // first: it may be the file that `forget` would close
		forget(m, s->first + i);
		m->stats.bytes_scratch += space(s->entries[i]);
		atomic_store_explicit(&m->spilled[s->first + i], s->entries[i], memory_order_relaxed);
	}
	written(s);
}

// What was begun may have spoilt the older version, which lay at the same place. The blocks are dirty and in the slot, so nobody
// asks for that; a flush that was to send it has to know.
void uf_scratch_failed(struct uf_slot *s)
{
	struct uf_memory *m = s->memory;
	m->scratch_failures++;
	for (uint64_t i = 0; i < s->begun && s->file >= 0; i++) {
		uint32_t old = atomic_load_explicit(&m->spilled[s->first + i], memory_order_relaxed);
		if (old && FILE_OF(old) == (uint32_t)s->file)
			forget(m, s->first + i);
	}
	written(s);
}

void uf_scratch_drop(struct uf_memory *m, uint64_t block)
{
	uint32_t old = atomic_load_explicit(&m->spilled[block], memory_order_relaxed);
	if (!old)
		return;
	if (!frozen(&m->scratch[FILE_OF(old)]) && space(old))
		fallocate(m->scratch[FILE_OF(old)].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(block << m->shift),
			  (off_t)space(old));
	forget(m, block);
}

// Reads a run of spilled blocks that the caller owns. -EAGAIN with `nowait`: it would wait for the disk.
int uf_scratch_read(struct uf_memory *m, uint64_t first, uint64_t count, char *area, char *packed, bool nowait)
{
	size_t size = uf_block_size(m);
	for (uint64_t i = 0; i < count; i++) {
		uint32_t entry = atomic_load_explicit(&m->spilled[first + i], memory_order_relaxed);
		char *out = area + (i << m->shift);
		if (!entry)
			return -EIO; // cannot be: the caller saw that it was spilled, and owns it
		if (STORED(entry) < 2) {
			memset(out, 0, size);
			continue;
		}
		size_t stored = STORED(entry) - 2;
		char *in = stored == size ? out : packed;
		for (size_t done = 0; done < stored;) {
			struct iovec v = {in + done, stored - done};
			ssize_t n = preadv2(m->scratch[FILE_OF(entry)].fd, &v, 1, (off_t)(((first + i) << m->shift) + done),
					    nowait ? RWF_NOWAIT : 0);
			if (n > 0) {
				done += (size_t)n;
			} else if (n == 0) {
				return -EIO;
			} else if (errno == EOPNOTSUPP && nowait) {
				atomic_store_explicit(&m->no_nowait_scratch, true, memory_order_relaxed);
				return -EAGAIN;
			} else if (errno != EINTR) {
				return -errno;
			}
		}
		if (in == packed && uf_lz4_expand(packed, stored, out, size) != (ptrdiff_t)size)
			return -EIO;
	}
	return 0;
}

static bool holds_something(const struct uf_pager *p)
{
	for (uint32_t k = 0; k < p->memories_capacity; k++)
		for (unsigned i = 0; p->memories[k] && p->memories[k]->spilled && i < UF_SCRATCHES; i++)
			if (p->memories[k]->scratch[i].blocks)
				return true;
	return false;
}

void uf_scratch_before_fork(struct uf_pager *p)
{
	p->generation_end = -1;
	if (!holds_something(p))
		return;
	reap_generations(p);
	unsigned g = 0;
	while (g < UF_GENERATIONS && p->generations[g] >= 0)
		g++;
	int ends[2];
	bool known = g < UF_GENERATIONS && !pipe2(ends, O_CLOEXEC);
	if (known) {
		int in = uf_high_fd(ends[0]), out = uf_high_fd(ends[1]);
		known = in >= 0 && out >= 0;
		if (!known) {
			if (in >= 0)
				close(in);
			if (out >= 0)
				close(out);
		} else {
			p->generations[g] = in;
			p->generation_end = out;
		}
	}
	for (uint32_t k = 0; k < p->memories_capacity; k++) {
		struct uf_memory *m = p->memories[k];
		for (unsigned i = 0; m && i < UF_SCRATCHES; i++) {
			if (!m->scratch[i].blocks)
				continue;
			if (known)
				m->scratch[i].readers |= 1ULL << g;
			else
				m->scratch[i].inherited = true; // nobody will tell
			if (m->scratch_now == (int)i)
				m->scratch_now = -1;
		}
	}
}

// Each side keeps its end of the pipe. The child's stays open until the process ends, or becomes another program.
void uf_scratch_after_fork(struct uf_pager *p, bool child)
{
	if (!child) {
		if (p->generation_end >= 0)
			close(p->generation_end);
		p->generation_end = -1;
		return;
	}
	uf_generations_close(p);
	for (uint32_t k = 0; k < p->memories_capacity; k++) {
		struct uf_memory *m = p->memories[k];
		for (unsigned i = 0; m && m->spilled && i < UF_SCRATCHES; i++) {
			struct uf_scratch *file = &m->scratch[i];
			file->writers = 0; // they were threads of the parent
			file->readers = 0;
			file->inherited = true;
			if (file->fd >= 0 && !file->blocks) { // empty: the parent goes on to write into it
				close(file->fd);
				*file = (struct uf_scratch){.fd = -1};
			}
		}
		if (m)
			m->scratch_now = -1;
	}
}

void uf_generations_close(struct uf_pager *p)
{
	for (unsigned g = 0; g < UF_GENERATIONS; g++) {
		if (p->generations[g] >= 0)
			close(p->generations[g]);
		p->generations[g] = -1;
	}
}

void uf_scratch_close(struct uf_memory *m)
{
	for (unsigned i = 0; i < UF_SCRATCHES; i++)
		if (m->scratch[i].fd >= 0)
			close(m->scratch[i].fd);
}
