/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The ready-made file host: API-60 to API-66. */
#include "util.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

static char image_path[512], base_path[512];

static struct fvd_create params(uint64_t size)
{
    return (struct fvd_create){ .struct_size = sizeof(struct fvd_create), .virtual_size = size, .block_size = 4096,
                                .journal_size = MIB };
}

static struct fvd_file *open_file(uint32_t flags)
{
    struct fvd_file_options options = { .struct_size = sizeof(options), .flags = flags };
    struct fvd_file *file = NULL;
    int ret = fvd_file_open(image_path, &options, &file);
    if (ret < 0) {
        fprintf(stderr, "%s\n", fvd_error());
    }
    CHECK_EQ(ret, 0);
    CHECK(file);
    return file;
}

static void make_base(uint64_t len)
{
    int fd = open(base_path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    CHECK(fd >= 0);
    for (uint64_t at = 0; at < len; at += 4096) {
        uint8_t buf[4096];
        for (int i = 0; i < 4096; i++) {
            buf[i] = base_byte(at + (uint64_t)i);
        }
        CHECK_EQ(write(fd, buf, sizeof(buf)), sizeof(buf));
    }
    CHECK_EQ(close(fd), 0);
}

static void check_file(struct fvd_file *file, uint64_t offset, size_t len, int byte)
{
    uint8_t *buf = malloc(len);
    CHECK(buf);
    CHECK_EQ(fvd_file_pread(file, buf, len, offset), len);
    for (size_t i = 0; i < len; i++) {
        CHECK_EQ(buf[i], byte < 0 ? base_byte(offset + i) : byte);
    }
    free(buf);
}

/* API-60 */
static void blocking(uint32_t flags)
{
    struct fvd_create p = params(8 * MIB);
    struct fvd_info info = { .struct_size = sizeof(info) };
    uint8_t *buf = malloc(MIB);
    CHECK(buf);
    CHECK_EQ(fvd_file_create(image_path, &p, NULL), 0);
    struct fvd_file *file = open_file(flags);
    memset(buf, 0x42, MIB);
    CHECK_EQ(fvd_file_pwrite(file, buf, MIB, 4321), MIB);
    CHECK_EQ(fvd_file_flush(file), 0);
    check_file(file, 4321, MIB, 0x42);
    check_file(file, 0, 4321, 0);
    CHECK_EQ(fvd_file_pread(file, buf, 1, 8 * MIB), -EINVAL);
    CHECK(strlen(fvd_error()) > 0);
    CHECK_EQ(fvd_file_pread(file, NULL, 0, 0), 0);
    CHECK_EQ(fvd_file_pread(file, NULL, 1, 0), -EINVAL);
    CHECK_EQ(fvd_image_info(fvd_file_image(file), &info), 0);
    CHECK_EQ(info.virtual_size, 8 * MIB);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK(!file);
    file = open_file(flags | FVD_OPEN_RDONLY);
    check_file(file, 4321, MIB, 0x42);
    CHECK_EQ(fvd_file_pwrite(file, buf, 512, 0), -EROFS);
    CHECK_EQ(fvd_file_close(&file), 0);
    file = open_file(FVD_OPEN_NO_IO);
    CHECK_EQ(fvd_image_info(fvd_file_image(file), &info), 0);
    CHECK(fvd_file_pread(file, buf, 512, 0) < 0);
    CHECK_EQ(fvd_file_close(&file), 0);
    free(buf);
}

/* API-61 */
static void locks(void)
{
    struct fvd_file_options options = { .struct_size = sizeof(options) };
    struct fvd_create p = params(MIB);
    struct fvd_file *other = NULL;
    struct fvd_file *file = open_file(0);
    CHECK_EQ(fvd_file_open(image_path, &options, &other), -EAGAIN);
    options.flags = FVD_OPEN_RDONLY;
    CHECK_EQ(fvd_file_open(image_path, &options, &other), -EAGAIN);
    CHECK(!other);
    /* Nor is it made anew under its user. */
    CHECK_EQ(fvd_file_create(image_path, &p, NULL), -EAGAIN);
    options.flags |= FVD_FILE_NO_LOCK;
    CHECK_EQ(fvd_file_open(image_path, &options, &other), 0);
    CHECK_EQ(fvd_file_close(&other), 0);
    /* The bytes that QEMU looks at (its file-posix driver): 100 + and 200 + the permission. */
    int fd = open(image_path, O_RDWR);
    CHECK(fd >= 0);
    for (int byte = 100; byte <= 203; byte++) {
        struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
        CHECK_EQ(fcntl(fd, F_OFD_GETLK, &lock), 0);
        /* Consistent read, write and resize are used; write and resize are denied. */
        bool taken = byte == 100 || byte == 101 || byte == 103 || byte == 201 || byte == 203;
        CHECK_EQ(lock.l_type != F_UNLCK, taken);
    }
    CHECK_EQ(fvd_file_close(&file), 0);
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 100, .l_len = 104 };
    CHECK_EQ(fcntl(fd, F_OFD_GETLK, &lock), 0);
    CHECK_EQ(lock.l_type, F_UNLCK);
    CHECK_EQ(close(fd), 0);
    /* Readers go together. */
    file = open_file(FVD_OPEN_RDONLY);
    options.flags = FVD_OPEN_RDONLY;
    CHECK_EQ(fvd_file_open(image_path, &options, &other), 0);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(fvd_file_close(&other), 0);
}

/* API-62 */
static void bases(void)
{
    struct fvd_create p = params(UINT64_MAX);
    struct fvd_file_options options = { .struct_size = sizeof(options), .flags = FVD_FILE_ALLOW_BASE };
    const char *slash = strrchr(base_path, '/');
    make_base(2 * MIB);
    /* Relative to the image. */
    p.base_name = slash + 1;
    p.base_format = "raw";
    CHECK_EQ(fvd_file_create(image_path, &p, &options), 0);
    struct fvd_file *file = open_file(FVD_FILE_ALLOW_BASE);
    check_file(file, 0, 2 * MIB, -1);
    CHECK_EQ(fvd_file_pwrite(file, "xxxx", 4, 10), 4);
    check_file(file, 14, 4096, -1);
    CHECK_EQ(fvd_file_close(&file), 0);
    file = open_file(FVD_OPEN_RDONLY);
    check_file(file, 10, 4, 'x');
    check_file(file, 4096, MIB, 0);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(unlink(base_path), 0);
    struct fvd_file *none;
    CHECK_EQ(fvd_file_open(image_path, &options, &none), -ENOENT);
    CHECK(strstr(fvd_error(), slash + 1));
}

struct async {
    struct result r;
    struct fvd_file *file;
};

static void in_callback(struct result *r)
{
    struct async *a = (struct async *)r;
    struct fvd_file *file = a->file;
    char byte;
    /* API-64 */
    CHECK_EQ(fvd_file_process(a->file, 0), -EBUSY);
    CHECK_EQ(fvd_file_pread(a->file, &byte, 1, 0), -EBUSY);
    CHECK_EQ(fvd_file_pwrite(a->file, &byte, 1, 0), -EBUSY);
    CHECK_EQ(fvd_file_flush(a->file), -EBUSY);
    CHECK_EQ(fvd_file_close(&file), -EBUSY);
    CHECK(file == a->file);
}

/* API-63, API-65 */
static void asynchronous(void)
{
    struct fvd_create p = params(8 * MIB);
    static struct async a[32];
    static uint8_t buf[32][5000], back[32][5000];
    struct iovec iov[32];
    int open_requests = 32;
    CHECK_EQ(fvd_file_create(image_path, &p, NULL), 0);
    struct fvd_file *file = open_file(0);
    struct fvd_queue *queue = fvd_file_queue(file), *another = NULL;
    struct fvd_image *image = fvd_file_image(file);
    CHECK(queue && image);
    for (int i = 0; i < 32; i++) {
        a[i] = (struct async){ .r = { .then = in_callback }, .file = file };
        memset(buf[i], i + 1, sizeof(buf[i]));
        iov[i] = (struct iovec){ .iov_base = buf[i], .iov_len = sizeof(buf[i]) };
        fvd_submit_write(queue, (uint64_t)i * 5000, &iov[i], 1, 0, done, &a[i].r);
    }
    while (open_requests > 0) {
        struct pollfd events = { .fd = fvd_file_fd(file), .events = POLLIN };
        CHECK_EQ(poll(&events, 1, 30000), 1);
        CHECK(fvd_file_process(file, 0) >= 0);
        open_requests = 0;
        for (int i = 0; i < 32; i++) {
            open_requests += a[i].r.calls == 0;
        }
    }
    for (int i = 0; i < 32; i++) {
        CHECK_EQ(a[i].r.ret, 0);
        CHECK_EQ(a[i].r.calls, 1);
        a[i] = (struct async){ .file = file };
        iov[i].iov_base = back[i];
        fvd_submit_read(queue, (uint64_t)i * 5000, &iov[i], 1, 0, done, &a[i].r);
    }
    /* A blocking call serves them too. */
    CHECK_EQ(fvd_file_flush(file), 0);
    while (!fvd_queue_is_idle(queue)) {
        CHECK(fvd_file_process(file, 1000) >= 0);
    }
    for (int i = 0; i < 32; i++) {
        CHECK_EQ(a[i].r.calls, 1);
        CHECK(!memcmp(buf[i], back[i], sizeof(buf[i])));
    }
    CHECK_EQ(fvd_file_process(file, 0), 0);
    /* What belongs to the file. */
    CHECK_EQ(fvd_queue_free(&queue), -EINVAL);
    CHECK(queue);
    fvd_image_free(&image);
    CHECK(image);
    CHECK_EQ(fvd_queue_new(image, NULL, &another), -EINVAL);
    fvd_complete(queue, 1, 0);
    CHECK(strstr(fvd_error(), "itself"));
    /* Close waits for what is under way. */
    a[0] = (struct async){ .file = file };
    fvd_submit_write(queue, 0, &iov[1], 1, 0, done, &a[0].r);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(a[0].r.calls, 1);
    CHECK_EQ(a[0].r.ret, 0);
}

/* Lookups on the file host: the place in the file. */
static void lookup(void)
{
    struct fvd_mapping map;
    struct fvd_file *file = open_file(0);
    char a[512], b[512];
    memset(a, 0x77, sizeof(a));
    CHECK_EQ(fvd_file_pwrite(file, a, sizeof(a), 4 * MIB), sizeof(a));
    CHECK_EQ(fvd_lookup(fvd_file_image(file), 0, 4 * MIB, 512, 0, &map), FVD_LOOKUP_DATA);
    int fd = open(image_path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, b, sizeof(b), (off_t)map.offset), sizeof(b));
    CHECK(!memcmp(a, b, sizeof(a)));
    CHECK_EQ(close(fd), 0);
    fvd_end(fvd_file_image(file), map.token);
    CHECK_EQ(fvd_file_close(&file), 0);
}

/* API-66, API-65 */
static void failures(void)
{
    struct fvd_create p = params(513);
    struct fvd_file *file = NULL;
    struct stat st;
    unlink(image_path);
    CHECK_EQ(fvd_file_create(image_path, &p, NULL), -EINVAL);
    CHECK(stat(image_path, &st) < 0);
    CHECK_EQ(fvd_file_create("/nonexistent/directory/x", &p, NULL), -ENOENT);
    /* No image at all. */
    int fd = open(image_path, O_CREAT | O_WRONLY, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, "no image", 8), 8);
    CHECK_EQ(close(fd), 0);
    CHECK(fvd_file_open(image_path, NULL, &file) < 0);
    CHECK(!file);
    CHECK(fvd_file_open("/", NULL, &file) < 0);
    /* The locks are gone with it. */
    p = params(MIB);
    CHECK_EQ(fvd_file_create(image_path, &p, NULL), 0);
    /* A close that fails frees all the same: the image was closed behind the file's back. */
    struct result r = { 0 };
    file = open_file(0);
    fvd_submit_close(fvd_file_queue(file), done, &r);
    while (!r.calls) {
        CHECK(fvd_file_process(file, -1) >= 0);
    }
    CHECK_EQ(fvd_file_close(&file), -EBUSY);
    CHECK(!file);
    file = open_file(0);
    CHECK_EQ(fvd_file_close(&file), 0);
}

int main(void)
{
    snprintf(image_path, sizeof(image_path), "%s", temp_name("image.fvd"));
    snprintf(base_path, sizeof(base_path), "%s", temp_name("base.raw"));
    blocking(0);
    /* Past the page cache, where the file system can. */
    struct fvd_file_options options = { .struct_size = sizeof(options), .flags = FVD_FILE_DIRECT };
    struct fvd_file *direct;
    int ret = fvd_file_open(image_path, &options, &direct);
    if (ret == 0) {
        CHECK_EQ(fvd_file_close(&direct), 0);
        blocking(FVD_FILE_DIRECT);
    } else {
        CHECK(ret == -EINVAL || ret == -ENOTSUP);
        fprintf(stderr, "no direct I/O here, not tested: %s\n", fvd_error());
    }
    locks();
    bases();
    asynchronous();
    lookup();
    failures();
    unlink(image_path);
    unlink(base_path);
    return 0;
}
