/* Preloaded under a program, it makes the system fail as a script says.
 *
 * NF4_FAULT="OPERATION MODE NUMBER PART": the NUMBER-th call (from 1) of OPERATION (read, write,
 * sync, allocate, rename, unlink, or any but read) on a file whose path contains PART, by MODE,
 *   enospc, eio: fails so, and so do all later ones of that kind (a full disk stays full);
 *   kill: is not made, the process is killed with SIGKILL;
 *   short: moves 1 to 4096 bytes only, and so do all later ones;
 *   count: is made; at the end the number of calls is written to the descriptor NF4_COUNT_FD.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char operation[16], mode[16], part[256];
static long number;
static atomic_long calls;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void setup(void) {
  const char* text = getenv("NF4_FAULT");
  if (!text || sscanf(text, "%15s %15s %ld %255s", operation, mode, &number, part) != 4)
    operation[0] = 0;
}

__attribute__((destructor)) static void tell(void) {
  const char* fd = getenv("NF4_COUNT_FD");
  if (fd && !strcmp(mode, "count")) dprintf(atoi(fd), "%ld\n", (long)calls);
}

/* nf4 ends so, which runs no destructor. */
void _exit(int status) {
  tell();
  ((void (*)(int))dlsym(RTLD_NEXT, "_exit"))(status);
  abort();
}

static int concerns(const char* what, const char* path) {
  pthread_once(&once, setup);
  if (!operation[0] || !strstr(path, part)) return 0;
  return !strcmp(operation, "any") ? strcmp(what, "read") != 0 : !strcmp(operation, what);
}

/* 0: go on; -1: fail with errno; 1: move few bytes. */
static int fault(const char* what, const char* path) {
  if (!concerns(what, path)) return 0;
  const long call = atomic_fetch_add(&calls, 1) + 1;
  if (call < number || !strcmp(mode, "count")) return 0;
  if (!strcmp(mode, "kill")) {
    kill(getpid(), SIGKILL);
    pause();
  }
  if (!strcmp(mode, "short")) return 1;
  errno = !strcmp(mode, "enospc") ? ENOSPC : EIO;
  return -1;
}

static int fault_of(const char* what, int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return fault(what, path);
}

static size_t few(size_t count) {
  const size_t most = 1 + ((size_t)calls * 2654435761u >> 7) % 4096;
  return count < most ? count : most;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAULTY(what, fd, count)         \
  const int found = fault_of(what, fd); \
  if (found < 0) return -1;             \
  if (found > 0) count = few(count)

ssize_t read(int fd, void* data, size_t count) {
  FAULTY("read", fd, count);
  return REAL(read)(fd, data, count);
}
ssize_t pread(int fd, void* data, size_t count, off_t place) {
  FAULTY("read", fd, count);
  return REAL(pread)(fd, data, count, place);
}
ssize_t pread64(int fd, void* data, size_t count, off64_t place) {
  FAULTY("read", fd, count);
  return REAL(pread64)(fd, data, count, place);
}
ssize_t write(int fd, const void* data, size_t count) {
  FAULTY("write", fd, count);
  return REAL(write)(fd, data, count);
}
ssize_t pwrite(int fd, const void* data, size_t count, off_t place) {
  FAULTY("write", fd, count);
  return REAL(pwrite)(fd, data, count, place);
}
ssize_t pwrite64(int fd, const void* data, size_t count, off64_t place) {
  FAULTY("write", fd, count);
  return REAL(pwrite64)(fd, data, count, place);
}
/* One buffer is all that nf4 passes; the others stay as they are. */
ssize_t preadv(int fd, const struct iovec* parts, int n, off_t place) {
  struct iovec first = parts[0];
  FAULTY("read", fd, first.iov_len);
  return found > 0 ? REAL(preadv)(fd, &first, 1, place) : REAL(preadv)(fd, parts, n, place);
}
ssize_t preadv64(int fd, const struct iovec* parts, int n, off64_t place) {
  struct iovec first = parts[0];
  FAULTY("read", fd, first.iov_len);
  return found > 0 ? REAL(preadv64)(fd, &first, 1, place) : REAL(preadv64)(fd, parts, n, place);
}
ssize_t preadv2(int fd, const struct iovec* parts, int n, off_t place, int flags) {
  struct iovec first = parts[0];
  FAULTY("read", fd, first.iov_len);
  return found > 0 ? REAL(preadv2)(fd, &first, 1, place, flags)
                   : REAL(preadv2)(fd, parts, n, place, flags);
}
ssize_t preadv64v2(int fd, const struct iovec* parts, int n, off64_t place, int flags) {
  struct iovec first = parts[0];
  FAULTY("read", fd, first.iov_len);
  return found > 0 ? REAL(preadv64v2)(fd, &first, 1, place, flags)
                   : REAL(preadv64v2)(fd, parts, n, place, flags);
}
int fsync(int fd) { return fault_of("sync", fd) < 0 ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fault_of("sync", fd) < 0 ? -1 : REAL(fdatasync)(fd); }
int posix_fallocate(int fd, off_t start, off_t count) {
  return fault_of("allocate", fd) < 0 ? errno : REAL(posix_fallocate)(fd, start, count);
}
int posix_fallocate64(int fd, off64_t start, off64_t count) {
  return fault_of("allocate", fd) < 0 ? errno : REAL(posix_fallocate64)(fd, start, count);
}
int rename(const char* from, const char* to) {
  return fault("rename", from) < 0 ? -1 : REAL(rename)(from, to);
}
int unlink(const char* path) { return fault("unlink", path) < 0 ? -1 : REAL(unlink)(path); }
int rmdir(const char* path) { return fault("unlink", path) < 0 ? -1 : REAL(rmdir)(path); }
