/* A disk that fails: errors, or delays, put into the calls of a process that write below one folder.

   Loaded with LD_PRELOAD. CPMPI_FAULT_LOG names a file to which every such call is added as "OPERATION PATH\n". A call is
   made to fail by fault_arm (through ctypes), or by CPMPI_FAULT="OPERATION NTH ERRNO STICKY MICROSECONDS PATH": the NTH
   call (from 0) of that kind on that path fails, and with STICKY every one of any kind below the folder after it, as on a
   disk that stays full; with ERRNO 0 all calls from the NTH on wait so long instead. CPMPI_FAULT_FOLDER is the folder. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX], log_path[PATH_MAX], path_armed[PATH_MAX], operation[32];
static int nth = -1, error_armed, sticky, seen, failing, hits;
static long delay_us;

int fault_arm(const char *op, const char *path, int n, int error, int stays, long us) {
    pthread_mutex_lock(&lock);
    snprintf(operation, sizeof operation, "%s", op);
    snprintf(path_armed, sizeof path_armed, "%s", path);
    nth = n, error_armed = error, sticky = stays, seen = failing = hits = 0, delay_us = us;
    pthread_mutex_unlock(&lock);
    return 0;
}

int fault_hits(void) { return hits; }

void fault_log(const char *path) { snprintf(log_path, sizeof log_path, "%s", path); }

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("CPMPI_FAULT_FOLDER"), *fault = getenv("CPMPI_FAULT");
    snprintf(folder, sizeof folder, "%s", text ? text : "");
    if (fault) {
        char op[32], path[PATH_MAX];
        int n, error, stays;
        long us;
        if (sscanf(fault, "%31s %d %d %d %ld %4095s", op, &n, &error, &stays, &us, path) == 6)
            fault_arm(op, path, n, error, stays, us);
    }
}

/* The error that a call has to fail with; 0: none. */
static int fault(const char *op, const char *path) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length) || (path[length] != '/' && path[length]))
        return 0;
    pthread_mutex_lock(&lock);
    if (log_path[0]) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %s\n", op, path);
        int to = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CREAT, 0644);
        syscall(SYS_write, to, line, size);
        syscall(SYS_close, to);
    }
    int error = failing && sticky ? error_armed : 0;
    long wait_us = 0;
    if (nth >= 0 && !strcmp(op, operation) && !strcmp(path, path_armed) && seen++ >= nth) {
        if (!error_armed)
            wait_us = delay_us, hits++;
        else if (!failing)
            failing = 1, hits++, error = error_armed;
    }
    pthread_mutex_unlock(&lock);
    if (wait_us)
        usleep(wait_us);
    return error;
}

static int fault_of(const char *op, int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0)
        return 0;
    path[size] = 0;
    return fault(op, path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(found) do { int e = (found); if (e) { errno = e; return -1; } } while (0)
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (WRITES(flags)) FAIL(fault("open", path)); REAL(name); return real(path, flags, mode); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (WRITES(flags)) FAIL(fault("open", path)); REAL(name); return real(at, path, flags, mode); }
#define PWRITE(name, offset_type) ssize_t name(int fd, const void *data, size_t size, offset_type at) { \
    FAIL(fault_of("pwrite", fd)); REAL(name); return real(fd, data, size, at); }
#define TRUNCATE(name, offset_type) int name(int fd, offset_type size) { \
    FAIL(fault_of("ftruncate", fd)); REAL(name); return real(fd, size); }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
TRUNCATE(ftruncate, off_t) TRUNCATE(ftruncate64, off64_t)
ssize_t write(int fd, const void *data, size_t size) { FAIL(fault_of("write", fd)); REAL(write); return real(fd, data, size); }
int fsync(int fd) { FAIL(fault_of("fsync", fd)); REAL(fsync); return real(fd); }
int fdatasync(int fd) { FAIL(fault_of("fsync", fd)); REAL(fdatasync); return real(fd); }
int rename(const char *from, const char *to) { FAIL(fault("rename", to)); REAL(rename); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL(fault("rename", to)); REAL(renameat); return real(a, from, b, to); }
int unlink(const char *path) { FAIL(fault("unlink", path)); REAL(unlink); return real(path); }
