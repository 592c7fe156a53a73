// Preloaded into a test's process: at its n-th call that changes a file system, what can happen to a machine happens.
//
// faults_arm(n, how) makes the n-th call from then on (the first is 0), before it is carried out,
//   KILL   end the process as SIGKILL does,
//   CRASH  the same, and what was written to files and not fsynced is lost: such files are left empty,
//   or any other value: fail with that errno, once.
// faults_seen() is how many calls there were since.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

namespace {

enum { KILL = -1, CRASH = -2 };
constexpr int kMostFiles = 64;

struct File {
    int fd;
    dev_t device;
    ino_t inode;
    bool is_dirty;
};

bool armed;
long left, seen;
int fault;
File files[kMostFiles];  // that were written to since faults_arm
int file_count;

File* find(int fd) {
    struct stat about;
    if (fstat(fd, &about) != 0 || !S_ISREG(about.st_mode)) return nullptr;
    for (int i = 0; i < file_count; ++i)
        if (files[i].device == about.st_dev && files[i].inode == about.st_ino) return &files[i];
    if (file_count == kMostFiles) return nullptr;
    files[file_count] = {dup(fd), about.st_dev, about.st_ino, false};
    return &files[file_count++];
}

// Whether this call is to fail, with errno set.
bool hit() {
    if (!armed) return false;
    ++seen;
    if (left-- != 0) return false;
    if (fault == KILL || fault == CRASH) {
        for (int i = 0; fault == CRASH && i < file_count; ++i)
            if (files[i].is_dirty && ftruncate(files[i].fd, 0) != 0) perror("ftruncate");
        kill(getpid(), SIGKILL);
    }
    errno = fault;
    return true;
}

template <class Function>
Function* real(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define CHANGES(type, name, parameters, arguments)        \
    extern "C" type name parameters {                     \
        static auto* call = real<type parameters>(#name); \
        return hit() ? -1 : call arguments;               \
    }

CHANGES(int, rename, (const char* from, const char* to), (from, to))
CHANGES(int, renameat, (int a, const char* from, int b, const char* to), (a, from, b, to))
CHANGES(int, renameat2, (int a, const char* from, int b, const char* to, unsigned flags), (a, from, b, to, flags))
CHANGES(int, mkdir, (const char* path, mode_t mode), (path, mode))
CHANGES(int, mkdirat, (int at, const char* path, mode_t mode), (at, path, mode))
CHANGES(int, rmdir, (const char* path), (path))
CHANGES(int, unlink, (const char* path), (path))
CHANGES(int, unlinkat, (int at, const char* path, int flags), (at, path, flags))
CHANGES(int, chmod, (const char* path, mode_t mode), (path, mode))
CHANGES(int, fchmod, (int fd, mode_t mode), (fd, mode))

extern "C" ssize_t write(int fd, const void* data, size_t count) {
    static auto* call = real<ssize_t(int, const void*, size_t)>("write");
    File* file = armed && fd > 2 ? find(fd) : nullptr;
    if (file == nullptr) return call(fd, data, count);
    if (hit()) return -1;
    file->is_dirty = true;
    return call(fd, data, count);
}

extern "C" int fsync(int fd) {
    static auto* call = real<int(int)>("fsync");
    if (hit()) return -1;
    const int status = call(fd);
    if (File* file = armed ? find(fd) : nullptr) file->is_dirty = false;
    return status;
}

// Opening makes a file where it is asked to; else it changes nothing.
#define OPENS(name)                                                       \
    extern "C" int name(const char* path, int flags, ...) {               \
        static auto* call = real<int(const char*, int, mode_t)>(#name);   \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        const mode_t mode = (flags & O_CREAT) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                     \
        return (flags & O_CREAT) && hit() ? -1 : call(path, flags, mode); \
    }

OPENS(open)
OPENS(open64)

extern "C" void faults_arm(long number, int how) { left = number, seen = 0, fault = how, file_count = 0, armed = true; }

extern "C" long faults_seen() { return seen; }
