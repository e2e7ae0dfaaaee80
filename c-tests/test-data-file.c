/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Guest data in a file of its own: API-76 to API-79. */
#include "util.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISK (MIB + 512)

static struct fvd_create params(const char *data_name, const char *base)
{
    return (struct fvd_create){ .struct_size = sizeof(struct fvd_create), .virtual_size = DISK, .block_size = 4096,
                                .journal_size = MIB, .base_name = base, .base_format = base ? "raw" : NULL,
                                .data_name = data_name, .data_format = data_name ? "raw" : NULL };
}

static int64_t create(struct mem_queue *q, const struct fvd_create *p)
{
    struct result r = { 0 };
    fvd_submit_create(q->queue, p, done, &r);
    return wait_for(q, &r);
}

static void start(struct disk *d, enum mode mode, bool base)
{
    struct fvd_create p = params("disk.raw", base ? "base.raw" : NULL);
    memset(d, 0, sizeof(*d));
    mem_host_init(&d->host, mode);
    d->host.files[FVD_FILE_DATA].there = true;
    if (base) {
        mem_host_base(&d->host, DISK);
    }
    d->image = image_new(&d->host, 0);
    queue_init(&d->q, &d->host, d->image);
    CHECK_EQ(create(&d->q, &p), 0);
    CHECK_EQ(do_open(&d->q), 0);
}

/* API-76 */
static void raw_content(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_block_status st = { .struct_size = sizeof(st) };
    struct fvd_mapping map;
    uint8_t *disk = malloc(DISK);
    CHECK(disk);

    start(&d, mode, false);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!strcmp(info.data_name, "disk.raw") && !strcmp(info.data_format, "raw"));
    CHECK_EQ(info.data_offset, 0);
    CHECK_EQ(do_fill(&d.q, 0x21, 70000, 1234), 0);
    CHECK_EQ(do_fill(&d.q, 0x22, 512, DISK - 512), 0);
    CHECK_EQ(do_read(&d.q, disk, DISK, 0), 0);
    CHECK_EQ(d.host.files[FVD_FILE_DATA].len, DISK);
    CHECK(!memcmp(d.host.files[FVD_FILE_DATA].data, disk, DISK));
    CHECK_EQ(do_status(&d.q, 4096, 4096, &st), 0);
    CHECK(st.place == FVD_PLACE_DATA && st.file == FVD_FILE_DATA && st.offset == 4096);
    CHECK_EQ(fvd_lookup(d.image, 0, 4096, 512, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_DATA);
    CHECK(map.file == FVD_FILE_DATA && map.offset == 4096 && map.len == 512);
    fvd_end(d.image, map.token);
    free(disk);
    disk_end(&d);
}

/* API-77 */
static void durable(enum mode mode)
{
    struct disk d;

    start(&d, mode, true);
    CHECK_EQ(do_fill(&d.q, 0x31, 8192, 4096), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 0x31, 8192, 4096);
    check_base(&d.q, 4096, 0);
    /* A failed flush of either file poisons. */
    CHECK_EQ(do_fill(&d.q, 0x32, 4096, 65536), 0);
    d.host.fail_kind = FLUSH;
    d.host.fail_file = FVD_FILE_DATA;
    d.host.fail_errno = EIO;
    CHECK_EQ(do_flush(&d.q), -EIO);
    d.host.fail_errno = 0;
    CHECK_EQ(do_fill(&d.q, 0x33, 512, 0), -EIO);
    check_bytes(&d.q, 0x32, 4096, 65536);
    struct fvd_info info = { .struct_size = sizeof(info) };
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(info.flags & FVD_INFO_POISONED);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 0x31, 8192, 4096);
    disk_end(&d);
}

static int64_t try_open(struct disk *d, uint32_t flags)
{
    d->image = image_new(&d->host, flags);
    queue_init(&d->q, &d->host, d->image);
    return do_open(&d->q);
}

static void drop(struct disk *d)
{
    run(&d->q);
    queue_free(&d->q);
    fvd_image_free(&d->image);
}

/* API-78 */
static void missing(enum mode mode)
{
    struct disk d;
    struct fvd_check check = { .struct_size = sizeof(check) };
    struct fvd_info info = { .struct_size = sizeof(info) };
    uint8_t buf[512];

    start(&d, mode, true);
    CHECK_EQ(do_fill(&d.q, 0x41, 4096, 0), 0);
    CHECK_EQ(do_close(&d.q), 0);
    drop(&d);
    for (int is_short = 0; is_short < 2; is_short++) {
        struct mem_file *data = &d.host.files[FVD_FILE_DATA];
        uint64_t len = data->len;

        data->there = is_short;
        data->len = is_short ? DISK - 512 : len;
        CHECK_EQ(try_open(&d, 0), is_short ? -EIO : -ENOMEDIUM);
        drop(&d);
        CHECK_EQ(try_open(&d, FVD_OPEN_RDONLY), is_short ? -EIO : -ENOMEDIUM);
        drop(&d);
        CHECK_EQ(try_open(&d, FVD_OPEN_RDONLY | FVD_OPEN_NO_IO), 0);
        CHECK_EQ(fvd_image_info(d.image, &info), 0);
        CHECK(!strcmp(info.data_name, "disk.raw"));
        CHECK_EQ(do_close(&d.q), 0);
        drop(&d);
        CHECK_EQ(try_open(&d, FVD_OPEN_METADATA), 0);
        CHECK_EQ(do_check(&d.q, &check), 0);
        CHECK_EQ(check.corruptions, 1);
        CHECK_EQ(do_read(&d.q, buf, sizeof(buf), 0), -EBUSY);
        CHECK_EQ(do_close(&d.q), 0);
        drop(&d);
        data->there = true;
        data->len = len;
    }
    CHECK_EQ(try_open(&d, 0), 0);
    check_bytes(&d.q, 0x41, 4096, 0);
    disk_end(&d);
}

static void wrong_arguments(void)
{
    struct disk d = { 0 };
    struct fvd_create p = params("disk.raw", NULL);

    mem_host_init(&d.host, INLINE);
    d.host.files[FVD_FILE_DATA].there = true;
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    p.data_format = NULL;
    CHECK_EQ(create(&d.q, &p), -EINVAL);
    p.data_format = "qcow2";
    CHECK_EQ(create(&d.q, &p), -ENOTSUP);
    p = params(NULL, NULL);
    p.data_format = "raw";
    CHECK_EQ(create(&d.q, &p), -EINVAL);
    drop(&d);
    mem_host_free(&d.host);
}

/* API-79 */
static void file_host(void)
{
    struct fvd_create p = params("test-data-file.raw", NULL);
    struct fvd_file_options options = { .struct_size = sizeof(options) };
    struct fvd_file *file = NULL;
    char image[512], data[512];
    uint8_t buf[4096], back[4096];
    struct stat st;

    snprintf(image, sizeof(image), "%s", temp_name("test-data-file.fvd"));
    snprintf(data, sizeof(data), "%s", temp_name("test-data-file.raw"));
    /* The name in the image is relative to the image. */
    p.data_name = strrchr(data, '/') + 1;
    CHECK_EQ(fvd_file_create(image, &p, NULL), 0);
    CHECK_EQ(stat(data, &st), 0);
    CHECK_EQ(st.st_size, DISK);
    CHECK_EQ(fvd_file_open(image, &options, &file), -ENOMEDIUM);
    CHECK(strstr(fvd_error(), p.data_name));
    options.flags = FVD_FILE_ALLOW_DATA;
    CHECK_EQ(fvd_file_open(image, &options, &file), 0);
    memset(buf, 0x51, sizeof(buf));
    CHECK_EQ(fvd_file_pwrite(file, buf, sizeof(buf), 8192), sizeof(buf));
    CHECK_EQ(fvd_file_flush(file), 0);
    int fd = open(data, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, back, sizeof(back), 8192), sizeof(back));
    CHECK(!memcmp(buf, back, sizeof(buf)));
    CHECK_EQ(close(fd), 0);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(unlink(data), 0);
    CHECK_EQ(fvd_file_open(image, &options, &file), -ENOENT);
    CHECK(strstr(fvd_error(), data));
    options.flags = FVD_OPEN_NO_IO;
    CHECK_EQ(fvd_file_open(image, &options, &file), 0);
    CHECK_EQ(fvd_file_close(&file), 0);
    options.flags = FVD_OPEN_METADATA | FVD_FILE_ALLOW_DATA;
    CHECK_EQ(fvd_file_open(image, &options, &file), 0);
    CHECK_EQ(fvd_file_pread(file, buf, 1, 0), -EBUSY);
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(unlink(image), 0);
}

int main(void)
{
    for (enum mode mode = INLINE; mode < MODES; mode++) {
        raw_content(mode);
        durable(mode);
        missing(mode);
    }
    wrong_arguments();
    file_host();
    return 0;
}
