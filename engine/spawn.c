// SPDX-License-Identifier: Apache-2.0
// How a worker process is started.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>

#include "internal.h"

extern char **environ;

// A worker ignores the terminal's signals: Ctrl-C reaches the whole group, and the program may handle it and go on
// reading. Its stdout is our stderr, since the program's stdout may be data.
int uf_worker_spawn(struct uf_pager *p, unsigned index, int fds[3], pid_t *ret)
{
	posix_spawnattr_t attr;
	posix_spawn_file_actions_t actions;
	sigset_t mask, defaults;
	posix_spawnattr_init(&attr);
	posix_spawn_file_actions_init(&actions);
	sigemptyset(&mask);
	sigaddset(&mask, SIGINT);
	sigaddset(&mask, SIGQUIT);
	sigaddset(&mask, SIGTSTP);
	sigfillset(&defaults);
	posix_spawnattr_setsigmask(&attr, &mask);
	posix_spawnattr_setsigdefault(&attr, &defaults);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	if (fcntl(2, F_GETFD) >= 0) {
		posix_spawn_file_actions_adddup2(&actions, 2, 1);
	} else {
		posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
		posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
	}
	for (int i = 0; i < 3; i++) // all of ours are 16 or higher
		posix_spawn_file_actions_adddup2(&actions, fds[i], 3 + i);
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 34)
	posix_spawn_file_actions_addclosefrom_np(&actions, 6);
#endif
	// The worker's number is its last argument.
	char number[16];
	const char *argv[64];
	size_t n = 0;
	for (; p->worker_argv[n] && n < 62; n++)
		argv[n] = p->worker_argv[n];
	snprintf(number, sizeof(number), "%u", index);
	argv[n++] = number;
	argv[n] = NULL;
	int err = posix_spawnp(ret, argv[0], &actions, &attr, (char *const *)argv, p->worker_env ? p->worker_env : environ);
	posix_spawn_file_actions_destroy(&actions);
	posix_spawnattr_destroy(&attr);
	return -err;
}
