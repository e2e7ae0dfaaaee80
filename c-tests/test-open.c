/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Making, opening and asking an image. */
#include "util.h"

/* API-24: one handle creates, then opens, then serves. */
static void create_then_open(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    disk_start(&d, mode, 4 * MIB, 2 * MIB);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK_EQ(info.version, 2);
    CHECK_EQ(info.virtual_size, 4 * MIB);
    CHECK_EQ(info.journal_size, 1 * MIB);
    CHECK_EQ(info.block_size, 4096);
    CHECK_EQ(info.covered, 2 * MIB);
    CHECK_EQ(info.blocks, 512);
    CHECK(info.metadata_bytes > 1 * MIB);
    CHECK(info.flags & FVD_INFO_CLEAN);
    CHECK(!(info.flags & FVD_INFO_POISONED));
    CHECK(!strcmp(info.base_name, "base.raw"));
    CHECK_EQ(fvd_probe(d.host.files[0].data, d.host.files[0].len), 2);
    CHECK(memcmp(info.uuid, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16) != 0);
    disk_end(&d);
}

/* API-27: read-only opens serve reads, refuse writes and write nothing. */
static void read_only(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, 4 * MIB, 1 * MIB);
    CHECK_EQ(do_fill(&d.q, 0x5a, 8192, 4096), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    /* Not closed: recovery has something to do, in memory only. */
    mem_host_crash(&d.host);
    mem_host_reset_counts(&d.host);
    disk_reopen(&d, FVD_OPEN_RDONLY);
    check_bytes(&d.q, 0x5a, 8192, 4096);
    CHECK_EQ(do_fill(&d.q, 1, 512, 0), -EROFS);
    CHECK_EQ(do_write_zeroes(&d.q, 0, 4096, 0), -EROFS);
    CHECK_EQ(do_resize(&d.q, 8 * MIB, 0), -EROFS);
    CHECK_EQ(do_flush(&d.q), 0);
    CHECK_EQ(do_close(&d.q), 0);
    CHECK_EQ(d.host.ops[WRITE] + d.host.ops[WRITE_ZEROES] + d.host.ops[TRUNCATE] + d.host.ops[DISCARD], 0);
    disk_end(&d);
}

/* API-28: without I/O only the description can be had. */
static void no_io(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_mapping map;
    uint8_t buf[512];
    disk_start(&d, mode, 4 * MIB, 1 * MIB);
    CHECK_EQ(do_close(&d.q), 0);
    mem_host_reset_counts(&d.host);
    /* The base is not looked at: it may be gone. */
    d.host.files[FVD_FILE_BASE].there = false;
    disk_reopen(&d, FVD_OPEN_NO_IO);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK_EQ(info.virtual_size, 4 * MIB);
    CHECK(!strcmp(info.base_name, "base.raw"));
    CHECK(!strcmp(info.base_format, "raw"));
    CHECK(info.flags & FVD_INFO_HAS_BASE_LENGTH);
    CHECK_EQ(info.base_length, 1 * MIB);
    CHECK(do_read(&d.q, buf, sizeof(buf), 0) < 0);
    CHECK_EQ(fvd_lookup(d.image, 0, 2 * MIB, 4096, 0, &map), FVD_LOOKUP_ASK);
    disk_end(&d);
}

/* Opening rubbish, or nothing, is an error and not a crash. */
static void rubbish(enum mode mode)
{
    struct mem_host host;
    struct mem_queue q;
    mem_host_init(&host, mode);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    CHECK(do_open(&q) < 0);
    /* API-24: a failed open leaves a handle that serves nothing any more. */
    CHECK_EQ(do_open(&q), -EBUSY);
    queue_free(&q);
    fvd_image_free(&image);

    host.files[0].data = realloc(host.files[0].data, MIB);
    host.files[0].len = MIB;
    memset(host.files[0].data, 0xa5, MIB);
    image = image_new(&host, 0);
    queue_init(&q, &host, image);
    CHECK_EQ(do_open(&q), -EINVAL);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        create_then_open(mode);
        read_only(mode);
        no_io(mode);
        rubbish(mode);
    }
    /* fvd_probe */
    CHECK_EQ(fvd_probe("FVD\0\r\n\x1a\n", 8), 2);
    CHECK_EQ(fvd_probe("\xa9\xf5\x43\x51....", 8), 1);
    CHECK_EQ(fvd_probe("QFI\xfb....", 8), 0);
    CHECK_EQ(fvd_probe(NULL, 8), 0);
    CHECK_EQ(fvd_version() >> 16, 0);
    CHECK(strlen(fvd_version_string()) >= 5);
    return 0;
}
