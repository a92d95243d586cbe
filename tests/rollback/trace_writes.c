// Loaded into a process with LD_PRELOAD, records what it does to the files below one folder, for power_cut.py.
//
// TRACE_FOLDER is that folder, absolute and without symbolic links. TRACE_FILE is appended to: for every call that
// succeeded, in the order in which they did, one line
//     name, descriptor, number, size of the data, path, new path
// separated by tabs, and the data itself. Paths are relative to the folder. `number` is what the call's integer was:
// flags of an open, offset of a write, length of a truncate. A sync that was made to fail is there as "fail".
//
// Only the calls that CPython and SQLite make are known (not writev, link, or mappings). Written for 64 bits, where
// open and open64 are the same.

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
#include <unistd.h>

// The C library's own function of that name.
#define REAL(name)                     \
  ({                                   \
    static __typeof__(&name) found;    \
    if (!found) {                      \
      found = dlsym(RTLD_NEXT, #name); \
    }                                  \
    found;                             \
  })

enum { MOST_DESCRIPTORS = 65536 };

static const char* folder;
static size_t folder_length;
static int trace = -1;
static char is_traced[MOST_DESCRIPTORS];

// Of trace_fail_sync.
static int removals_until_failure;
static int next_sync_fails;

// Held from before a call until it is recorded, so that the trace has the order in which calls took effect.
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void start(void) {
  const char* file = getenv("TRACE_FILE");
  const char* root = getenv("TRACE_FOLDER");
  if (!file || !root) {
    return;
  }
  trace = REAL(open)(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (trace < 0) {
    perror(file);
    abort();
  }
  folder_length = strlen(root);
  folder = root;
}

static void put(const void* data, size_t size) {
  // A trace with a hole would prove nothing.
  if (REAL(write)(trace, data, size) != (ssize_t)size) {
    perror("trace_writes: the trace cannot be written");
    abort();
  }
}

static void record(const char* name, int descriptor, long long number, const char* path, const char* new_path,
                   const void* data, size_t size) {
  char line[2 * PATH_MAX + 128];
  int length =
      snprintf(line, sizeof line, "%s\t%d\t%lld\t%zu\t%s\t%s\n", name, descriptor, number, size, path, new_path);
  put(line, (size_t)length);
  if (size) {
    put(data, size);
  }
}

// Puts the path relative to the traced folder into `relative`; null if it is not below it.
static const char* below(int directory, const char* path, char relative[PATH_MAX]) {
  if (!folder) {
    return NULL;
  }
  char base[PATH_MAX] = "";
  if (path[0] != '/') {
    char link[64] = "/proc/self/cwd";
    if (directory != AT_FDCWD) {
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    }
    ssize_t length = readlink(link, base, sizeof base - 2);
    if (length < 0) {
      return NULL;
    }
    strcpy(base + length, "/");
  }
  char full[2 * PATH_MAX];
  snprintf(full, sizeof full, "%s%s", base, path);
  if (strncmp(full, folder, folder_length) != 0 || (full[folder_length] != '/' && full[folder_length] != '\0')) {
    return NULL;
  }
  snprintf(relative, PATH_MAX, "%s", full + folder_length + (full[folder_length] == '/'));
  return relative;
}

static int traced(int descriptor) { return descriptor >= 0 && descriptor < MOST_DESCRIPTORS && is_traced[descriptor]; }

static int open_at(int directory, const char* path, int flags, mode_t mode) {
  char relative[PATH_MAX];
  if (!below(directory, path, relative)) {
    return REAL(openat)(directory, path, flags, mode);
  }
  pthread_mutex_lock(&order);
  int descriptor = REAL(openat)(directory, path, flags, mode);
  if (descriptor >= MOST_DESCRIPTORS) {
    abort();
  }
  if (descriptor >= 0) {
    is_traced[descriptor] = 1;
    record("open", descriptor, flags, relative, "", NULL, 0);
  }
  pthread_mutex_unlock(&order);
  return descriptor;
}

// The mode is only there when the call may create something.
static mode_t mode_of(int flags, va_list arguments) {
  int creates = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
  return creates ? (mode_t)va_arg(arguments, int) : 0;
}

#define DEFINE_OPEN(name)                        \
  int name(const char* path, int flags, ...) {   \
    va_list arguments;                           \
    va_start(arguments, flags);                  \
    mode_t mode = mode_of(flags, arguments);     \
    va_end(arguments);                           \
    return open_at(AT_FDCWD, path, flags, mode); \
  }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

#define DEFINE_OPENAT(name)                                   \
  int name(int directory, const char* path, int flags, ...) { \
    va_list arguments;                                        \
    va_start(arguments, flags);                               \
    mode_t mode = mode_of(flags, arguments);                  \
    va_end(arguments);                                        \
    return open_at(directory, path, flags, mode);             \
  }
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

int creat(const char* path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char* path, mode_t mode) { return creat(path, mode); }

int close(int descriptor) {
  if (!traced(descriptor)) {
    return REAL(close)(descriptor);
  }
  pthread_mutex_lock(&order);
  is_traced[descriptor] = 0;
  int result = REAL(close)(descriptor);
  // The descriptor is gone even where close reports an error.
  record("close", descriptor, 0, "", "", NULL, 0);
  pthread_mutex_unlock(&order);
  return result;
}

ssize_t write(int descriptor, const void* data, size_t size) {
  if (!traced(descriptor)) {
    return REAL(write)(descriptor, data, size);
  }
  pthread_mutex_lock(&order);
  ssize_t written = REAL(write)(descriptor, data, size);
  if (written > 0) {
    // Seen from behind, so that it also holds for files that are appended to.
    off_t offset = lseek(descriptor, 0, SEEK_CUR) - written;
    record("write", descriptor, offset, "", "", data, (size_t)written);
  }
  pthread_mutex_unlock(&order);
  return written;
}

#define DEFINE_PWRITE(name)                                                   \
  ssize_t name(int descriptor, const void* data, size_t size, off_t offset) { \
    if (!traced(descriptor)) {                                                \
      return REAL(name)(descriptor, data, size, offset);                      \
    }                                                                         \
    pthread_mutex_lock(&order);                                               \
    ssize_t written = REAL(name)(descriptor, data, size, offset);             \
    if (written > 0) {                                                        \
      record("write", descriptor, offset, "", "", data, (size_t)written);     \
    }                                                                         \
    pthread_mutex_unlock(&order);                                             \
    return written;                                                           \
  }
DEFINE_PWRITE(pwrite)
DEFINE_PWRITE(pwrite64)

#define DEFINE_TRUNCATE(name)                                  \
  int name(int descriptor, off_t length) {                     \
    if (!traced(descriptor)) {                                 \
      return REAL(name)(descriptor, length);                   \
    }                                                          \
    pthread_mutex_lock(&order);                                \
    int result = REAL(name)(descriptor, length);               \
    if (result == 0) {                                         \
      record("truncate", descriptor, length, "", "", NULL, 0); \
    }                                                          \
    pthread_mutex_unlock(&order);                              \
    return result;                                             \
  }
DEFINE_TRUNCATE(ftruncate)
DEFINE_TRUNCATE(ftruncate64)

#define DEFINE_SYNC(name)                             \
  int name(int descriptor) {                          \
    if (!traced(descriptor)) {                        \
      return REAL(name)(descriptor);                  \
    }                                                 \
    pthread_mutex_lock(&order);                       \
    int result = -1;                                  \
    if (next_sync_fails) {                            \
      next_sync_fails = 0;                            \
      record("fail", descriptor, 0, "", "", NULL, 0); \
      errno = EIO;                                    \
    } else {                                          \
      result = REAL(name)(descriptor);                \
    }                                                 \
    if (result == 0) {                                \
      record("sync", descriptor, 0, "", "", NULL, 0); \
    }                                                 \
    pthread_mutex_unlock(&order);                     \
    return result;                                    \
  }
DEFINE_SYNC(fsync)
DEFINE_SYNC(fdatasync)

int renameat(int directory, const char* path, int new_directory, const char* new_path) {
  char from[PATH_MAX], to[PATH_MAX];
  const char* relative = below(directory, path, from);
  const char* new_relative = below(new_directory, new_path, to);
  if (!relative && !new_relative) {
    return REAL(renameat)(directory, path, new_directory, new_path);
  }
  if (!relative || !new_relative) {
    fputs("trace_writes: a rename into or out of the traced folder\n", stderr);
    abort();
  }
  pthread_mutex_lock(&order);
  int result = REAL(renameat)(directory, path, new_directory, new_path);
  if (result == 0) {
    record("rename", -1, 0, relative, new_relative, NULL, 0);
  }
  pthread_mutex_unlock(&order);
  return result;
}

int rename(const char* path, const char* new_path) { return renameat(AT_FDCWD, path, AT_FDCWD, new_path); }

int unlinkat(int directory, const char* path, int flags) {
  char relative[PATH_MAX];
  if (!below(directory, path, relative)) {
    return REAL(unlinkat)(directory, path, flags);
  }
  pthread_mutex_lock(&order);
  int result = REAL(unlinkat)(directory, path, flags);
  if (result == 0) {
    record("remove", -1, 0, relative, "", NULL, 0);
    if (removals_until_failure && --removals_until_failure == 0) {
      next_sync_fails = 1;
    }
  }
  pthread_mutex_unlock(&order);
  return result;
}

int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char* path, mode_t mode) {
  char relative[PATH_MAX];
  if (!below(directory, path, relative)) {
    return REAL(mkdirat)(directory, path, mode);
  }
  pthread_mutex_lock(&order);
  int result = REAL(mkdirat)(directory, path, mode);
  if (result == 0) {
    record("mkdir", -1, 0, relative, "", NULL, 0);
  }
  pthread_mutex_unlock(&order);
  return result;
}

int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

// For the process itself: the first sync after the next so many removals fails, as on a disk with an error.
void trace_fail_sync(int removals) {
  pthread_mutex_lock(&order);
  removals_until_failure = removals;
  pthread_mutex_unlock(&order);
}

// For the process itself: what it now holds to be safe.
void trace_mark(const char* text) {
  pthread_mutex_lock(&order);
  record("mark", -1, 0, text, "", NULL, 0);
  pthread_mutex_unlock(&order);
}
