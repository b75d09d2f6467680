/* A disk that fails or a process that dies at the n-th change of a folder: preloaded (LD_PRELOAD) into a training on Linux.
 *
 * Every call that changes something below the folder is a point, whoever makes it: Python, the Rust of safetensors, TensorBoard's
 * thread. Each is written to the log, one line "call path". At point `at`:
 *   kill-before, kill-torn, kill-after   SIGKILL before the call, after half of what is written, after the call
 *   full-once, full                      ENOSPC for the first call from there on that needs room, or for all of them
 *   read-only                            EROFS for all calls from there on
 * Armed by the environment (FAULT_FOLDER, FAULT_MODE, FAULT_AT, FAULT_LOG) or by fault_arm(), which a forked child calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_TORN, KILL_AFTER, FULL_ONCE, FULL, READ_ONLY };
static const char *NAMES[] = {"count", "kill-before", "kill-torn", "kill-after", "full-once", "full", "read-only"};

static char folder[PATH_MAX];
static int mode = COUNT, log_file = -1;
static long at;
static atomic_long points;
static atomic_int failed;

void fault_arm(const char *where, const char *how, long number, const char *log) {
    for (int i = 0; i <= READ_ONLY; i++)
        if (!strcmp(how, NAMES[i])) mode = i;
    at = number;
    log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    strncpy(folder, where, sizeof folder - 1);
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *where = getenv("FAULT_FOLDER");
    if (where) fault_arm(where, getenv("FAULT_MODE"), atol(getenv("FAULT_AT")), getenv("FAULT_LOG"));
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

/* The whole path of a name relative to an open folder, or of an open file (name NULL); 0 when it is not below the folder. */
static int below(int descriptor, const char *name, char *path) {
    char base[PATH_MAX] = "", link[64];
    if (!folder[0]) return 0;
    if (!name || name[0] != '/') {
        snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size <= 0) return 0;
        base[size] = 0;
    }
    snprintf(path, PATH_MAX, name && base[0] ? "%s/%s" : "%s%s", base, name ? name : "");
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* Counts a call. 0: let it through; -1: errno is set, fail; 1: it is the one to die in, after its work. */
static int point(const char *call, int needs_room, int descriptor, const char *name) {
    char path[PATH_MAX], line[PATH_MAX + 32];
    int before = errno;
    if (!below(descriptor, name, path)) return errno = before, 0;
    long number = atomic_fetch_add(&points, 1);
    if (log_file >= 0) syscall(SYS_write, log_file, line, snprintf(line, sizeof line, "%s %s\n", call, path));
    errno = before;
    if (number < at || mode == COUNT) return 0;
    if (mode <= KILL_AFTER) {
        if (number > at) return 0;
        if (mode == KILL_BEFORE) die();
        return 1;
    }
    if (mode == READ_ONLY) return errno = EROFS, -1;
    if (!needs_room || (mode == FULL_ONCE && atomic_exchange(&failed, 1))) return 0;
    return errno = ENOSPC, -1;
}

#define RETURN(fate, result) do { long done = (result); if ((fate) > 0) die(); return done; } while (0)

static ssize_t written(int file, const void *data, size_t size) {
    static atomic_int fitted;
    int fate = point("write", 1, file, NULL);
    if (fate < 0 && !(errno == ENOSPC && size > 1 && !atomic_exchange(&fitted, 1))) return -1;
    if (fate < 0 || (fate > 0 && mode == KILL_TORN)) size = (size + 1) / 2; /* of what fills the disk a part still fits */
    RETURN(fate, syscall(SYS_write, file, data, size));
}

static int opened(int base, const char *path, int flags, mode_t rights) {
    int makes = (flags & O_CREAT) && syscall(SYS_faccessat, base, path, F_OK);
    int fate = (flags & O_ACCMODE) == O_RDONLY ? 0 : point("open", makes, base, path);
    if (fate < 0) return -1;
    RETURN(fate, syscall(SYS_openat, base, path, flags, rights));
}

static mode_t rights_of(int flags, va_list more) { return flags & O_CREAT ? va_arg(more, mode_t) : 0; }

#define OPENS(name, parameters, base)                                  \
    int name parameters {                                              \
        va_list more;                                                  \
        va_start(more, flags);                                         \
        mode_t rights = rights_of(flags, more);                        \
        va_end(more);                                                  \
        return opened(base, path, flags, rights);                      \
    }
OPENS(open, (const char *path, int flags, ...), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENS(openat, (int base, const char *path, int flags, ...), base)
OPENS(openat64, (int base, const char *path, int flags, ...), base)

ssize_t write(int file, const void *data, size_t size) { return written(file, data, size); }

ssize_t writev(int file, const struct iovec *parts, int count) {
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return written(file, parts[i].iov_base, parts[i].iov_len); /* a short write, which is allowed */
    return 0;
}

#define SIMPLE(name, parameters, call, room, base, path, ...)          \
    int name parameters {                                              \
        int fate = point(call, room, base, path);                      \
        if (fate < 0) return -1;                                       \
        RETURN(fate, syscall(__VA_ARGS__));                            \
    }
SIMPLE(fsync, (int file), "fsync", 0, file, NULL, SYS_fsync, file)
SIMPLE(ftruncate, (int file, off_t size), "truncate", 0, file, NULL, SYS_ftruncate, file, size)
SIMPLE(ftruncate64, (int file, off64_t size), "truncate", 0, file, NULL, SYS_ftruncate, file, size)
SIMPLE(truncate64, (const char *path, off64_t size), "truncate", 0, AT_FDCWD, path, SYS_truncate, path, size)
SIMPLE(mkdir, (const char *path, mode_t rights), "mkdir", 1, AT_FDCWD, path, SYS_mkdirat, AT_FDCWD, path, rights)
SIMPLE(mkdirat, (int base, const char *path, mode_t rights), "mkdir", 1, base, path, SYS_mkdirat, base, path, rights)
SIMPLE(unlink, (const char *path), "delete", 0, AT_FDCWD, path, SYS_unlinkat, AT_FDCWD, path, 0)
SIMPLE(rmdir, (const char *path), "delete", 0, AT_FDCWD, path, SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR)
SIMPLE(unlinkat, (int base, const char *path, int flags), "delete", 0, base, path, SYS_unlinkat, base, path, flags)
SIMPLE(rename, (const char *from, const char *to), "rename", 0, AT_FDCWD, to, SYS_renameat, AT_FDCWD, from, AT_FDCWD, to)
SIMPLE(renameat, (int a, const char *from, int b, const char *to), "rename", 0, b, to, SYS_renameat, a, from, b, to)
