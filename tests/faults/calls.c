/* Preloaded into a process: makes its N-th system call on files fail or kill it, and records those that change a disk.
 *
 * arm(at, mode, code, log): count from 1. mode 'k': SIGKILL before the call; 't': before it, with half of a write done;
 * 'e': the call fails with errno `code`; 'h': the same, but a write does half of its work first and returns that;
 * 'd': it fails, and all that follow (a disk that died). log: a descriptor for records, or -1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

static long at, count;
static int mode, code, log_to = -1, is_armed;

void arm(long when, int how, int error, int descriptor) {
  at = when, mode = how, code = error, log_to = descriptor, count = 0, is_armed = 1;
}
long disarm(void) { is_armed = 0; return count; }

static void die(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

/* Whether this call is to fail. */
static int hits(void) {
  if (!is_armed) return 0;
  long number = ++count;
  if (number != at && !(mode == 'd' && number > at && at > 0)) return 0;
  if (mode == 'k' || mode == 't') die();
  errno = code;
  return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF_HIT(value) do { if (hits()) return value; } while (0)

static void note(const char *text, const void *data, size_t size) {
  if (!is_armed || log_to < 0) return;
  syscall(SYS_write, log_to, text, strlen(text));
  if (size) syscall(SYS_write, log_to, data, size);
}
static long inode(int fd) {
  struct stat s;
  return syscall(SYS_fstat, fd, &s) ? 0 : (long)s.st_ino;
}
static void note_fd(const char *verb, int fd, long number) {
  char text[128];
  snprintf(text, sizeof text, "%s\t%ld\t%ld\n", verb, inode(fd), number);
  note(text, 0, 0);
}
static void note_paths(const char *verb, const char *one, const char *other) {
  char text[4096];
  snprintf(text, sizeof text, "%s\t%s\t%s\n", verb, one, other);
  note(text, 0, 0);
}
static void note_open(int fd, const char *path, int flags) {
  char text[4096];
  if (fd < 0 || (flags & O_ACCMODE) == O_RDONLY) return;
  snprintf(text, sizeof text, "open\t%ld\t%d\t%s\n", inode(fd), (flags & O_TRUNC) != 0, path);
  note(text, 0, 0);
}

static int opened(int dir, const char *path, int flags, mode_t rights) {
  FAIL_IF_HIT(-1);
  int fd = syscall(SYS_openat, dir, path, flags, rights), saved = errno;
  note_open(fd, path, flags);
  errno = saved;
  return fd;
}
#define OPEN(name)                                              \
  int name(const char *path, int flags, ...) {                  \
    va_list more;                                               \
    va_start(more, flags);                                      \
    mode_t rights = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
    va_end(more);                                               \
    return opened(AT_FDCWD, path, flags, rights);               \
  }
OPEN(open)
OPEN(open64)

static ssize_t written(int fd, const void *data, size_t size, off_t place) {
  int is_torn = is_armed && count + 1 == at && size > 1 && (mode == 't' || mode == 'h');
  if (is_torn) {
    count++, size /= 2, at = mode == 'h' ? count + 1 : 0; /* after half a write the next call fails as a whole */
  } else {
    FAIL_IF_HIT(-1);
  }
  struct stat s;
  off_t from = place;
  if (from < 0) from = syscall(SYS_fcntl, fd, F_GETFL) & O_APPEND ? (syscall(SYS_fstat, fd, &s), s.st_size)
                                                                    : syscall(SYS_lseek, fd, 0, SEEK_CUR);
  ssize_t done = place < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, place);
  if (is_armed && done > 0) {
    char text[128];
    snprintf(text, sizeof text, "write\t%ld\t%ld\t%zd\n", inode(fd), (long)from, done);
    note(text, data, done);
  }
  if (is_torn && mode == 't') die();
  if (is_torn) mode = 'e';
  return done;
}
ssize_t write(int fd, const void *data, size_t size) { return written(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return written(fd, data, size, place); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t place) { return written(fd, data, size, place); }

int fsync(int fd) {
  FAIL_IF_HIT(-1);
  int done = syscall(SYS_fsync, fd);
  if (!done) note_fd("fsync", fd, 0);
  return done;
}
int fdatasync(int fd) { return fsync(fd); }
#define TRUNCATE(name)                                 \
  int name(int fd, off_t size) {                       \
    FAIL_IF_HIT(-1);                                   \
    int done = syscall(SYS_ftruncate, fd, size);       \
    if (!done) note_fd("truncate", fd, (long)size);    \
    return done;                                       \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)
int rename(const char *one, const char *other) {
  FAIL_IF_HIT(-1);
  int done = REAL(rename)(one, other);
  if (!done) note_paths("rename", one, other);
  return done;
}
int link(const char *one, const char *other) {
  FAIL_IF_HIT(-1);
  int done = REAL(link)(one, other);
  if (!done) note_paths("link", one, other);
  return done;
}
int unlink(const char *path) {
  FAIL_IF_HIT(-1);
  int done = REAL(unlink)(path);
  if (!done) note_paths("unlink", path, "");
  return done;
}
int rmdir(const char *path) {
  FAIL_IF_HIT(-1);
  int done = REAL(rmdir)(path);
  if (!done) note_paths("unlink", path, "");
  return done;
}
int mkdir(const char *path, mode_t rights) {
  FAIL_IF_HIT(-1);
  int done = REAL(mkdir)(path, rights);
  struct stat s;
  if (!done && !REAL(stat)(path, &s)) {
    char text[4096];
    snprintf(text, sizeof text, "mkdir\t%ld\t0\t%s\n", (long)s.st_ino, path);
    note(text, 0, 0);
  }
  return done;
}
int flock(int fd, int how) { FAIL_IF_HIT(-1); return syscall(SYS_flock, fd, how); }
int close(int fd) { /* as Linux does it: the descriptor is gone, whatever it answers */
  int hit = hits(), saved = errno, done = syscall(SYS_close, fd);
  if (hit) errno = saved;
  return hit ? -1 : done;
}
ssize_t read(int fd, void *data, size_t size) { FAIL_IF_HIT(-1); return syscall(SYS_read, fd, data, size); }
ssize_t pread64(int fd, void *data, size_t size, off_t place) {
  FAIL_IF_HIT(-1);
  return syscall(SYS_pread64, fd, data, size, place);
}
#define SEEK(name) \
  off_t name(int fd, off_t place, int from) { FAIL_IF_HIT(-1); return syscall(SYS_lseek, fd, place, from); }
SEEK(lseek)
SEEK(lseek64)
#define STATUS(name, kind)                                                              \
  int name(const char *path, struct kind *s) { FAIL_IF_HIT(-1); return REAL(name)(path, s); }
STATUS(stat, stat)
STATUS(stat64, stat64)
STATUS(lstat, stat)
STATUS(lstat64, stat64)
STATUS(statvfs, statvfs)
STATUS(statvfs64, statvfs64)
int fstat(int fd, struct stat *s) { FAIL_IF_HIT(-1); return syscall(SYS_fstat, fd, s); }
int fstat64(int fd, struct stat64 *s) { FAIL_IF_HIT(-1); return syscall(SYS_fstat, fd, s); }
DIR *opendir(const char *path) { FAIL_IF_HIT(NULL); return REAL(opendir)(path); }
struct dirent *readdir(DIR *d) { FAIL_IF_HIT(NULL); return REAL(readdir)(d); }
struct dirent64 *readdir64(DIR *d) { FAIL_IF_HIT(NULL); return REAL(readdir64)(d); }
FILE *fopen(const char *path, const char *how) { FAIL_IF_HIT(NULL); return REAL(fopen)(path, how); }
FILE *fopen64(const char *path, const char *how) { FAIL_IF_HIT(NULL); return REAL(fopen64)(path, how); }
