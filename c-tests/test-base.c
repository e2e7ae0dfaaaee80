/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-44, API-67: bases that come later; API-45: check. */
#include "util.h"

static void later(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    memset(&d, 0, sizeof(d));
    mem_host_init(&d.host, mode);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    /* A name, but no file yet. */
    CHECK_EQ(do_create(&d.q, 2 * MIB, "later.raw"), 0);
    CHECK_EQ(do_open(&d.q), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!(info.flags & FVD_INFO_HAS_BASE_LENGTH));
    /* API-38 */
    check_bytes(&d.q, 0, 2 * MIB, 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 8192), 0);
    check_bytes(&d.q, 1, 4096, 8192);
    CHECK_EQ(do_close(&d.q), 0);
    /* Here it is. */
    mem_host_base(&d.host, MIB);
    disk_reopen(&d, 0);
    check_base(&d.q, 8192, 0);
    check_bytes(&d.q, 1, 4096, 8192);
    check_base(&d.q, MIB - 12288, 12288);
    check_bytes(&d.q, 0, MIB, MIB);
    /* Another name. */
    CHECK_EQ(do_change_base(&d.q, "moved.raw", "raw"), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!strcmp(info.base_name, "moved.raw"));
    check_base(&d.q, 8192, 0);
    CHECK_EQ(do_change_base(&d.q, "x", ""), -EINVAL);
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!strcmp(info.base_name, "moved.raw"));
    check_base(&d.q, 8192, 0);
    /* Emptied, the disk is its base, now and later. */
    CHECK_EQ(do_make_empty(&d.q), 0);
    check_base(&d.q, MIB, 0);
    check_bytes(&d.q, 0, MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 2, 4096, 512), 0);
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    check_base(&d.q, 512, 0);
    check_bytes(&d.q, 2, 4096, 512);
    check_base(&d.q, MIB - 4608, 4608);
    disk_end(&d);
}

/* The first base of an image that had none, and none again. */
static void first(enum mode mode)
{
    struct disk d;
    struct fvd_info info = { .struct_size = sizeof(info) };
    disk_start(&d, mode, 2 * MIB, 0);
    CHECK_EQ(do_fill(&d.q, 1, 4096, 8192), 0);
    CHECK_EQ(do_change_base(&d.q, "first.raw", "raw"), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK(!strcmp(info.base_name, "first.raw"));
    check_bytes(&d.q, 1, 4096, 8192);
    CHECK_EQ(do_change_base(&d.q, NULL, NULL), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK_EQ(info.base_name[0], 0);
    check_bytes(&d.q, 1, 4096, 8192);
    check_bytes(&d.q, 0, 8192, 0);
    CHECK_EQ(do_make_empty(&d.q), -ENOTSUP);
    disk_end(&d);
}

static unsigned findings, findings_at_done;

static void finding(void *opaque, const char *text)
{
    struct result *r = opaque;
    CHECK_EQ(r->calls, 0);
    CHECK(text && strlen(text) > 0);
    findings++;
}

static void count_findings(struct result *r)
{
    (void)r;
    findings_at_done = findings;
}

/* API-45 */
static void check(enum mode mode)
{
    struct disk d;
    struct fvd_check report = { .struct_size = sizeof(report) };
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct result r = { .then = count_findings };
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    CHECK_EQ(do_check(&d.q, &report), 0);
    CHECK_EQ(report.corruptions, 0);
    CHECK_EQ(report.blocks_total, 256);
    CHECK_EQ(report.blocks_present, 16);
    CHECK(report.image_end > 0);
    CHECK_EQ(do_close(&d.q), 0);
    /* Rot in the metadata of a closed image: all but the header and the data. */
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    for (uint64_t at = 256 * KIB; at < info.data_offset; at += 512) {
        for (int i = 0; i < 512; i++) {
            d.host.files[0].data[at + i] ^= d.host.files[0].data[at + i] ? 0x40 : 0;
        }
    }
    struct fvd_image *image = image_new(&d.host, FVD_OPEN_RDONLY);
    struct mem_queue q;
    queue_init(&q, &d.host, image);
    int64_t ret = do_open(&q);
    if (ret == 0) {
        fvd_submit_check(q.queue, &report, 0, finding, done, &r);
        ret = wait_for(&q, &r);
        if (ret == 0) {
            CHECK(report.corruptions > 0);
            CHECK(findings > 0);
            CHECK_EQ(findings_at_done, findings);
        }
        CHECK_EQ(do_close(&q), 0);
    }
    CHECK(ret == 0 || ret == -EIO);
    queue_free(&q);
    fvd_image_free(&image);
    disk_end(&d);
}

/* API-72: one page of metadata after the other is rotten, alone, till it is the bitmap's. */
static void repair(enum mode mode)
{
    struct disk d;
    struct fvd_check report = { .struct_size = sizeof(report) };
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct result r = { 0 };
    unsigned repaired = 0;
    disk_start(&d, mode, 2 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    CHECK_EQ(do_close(&d.q), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    for (uint64_t at = 256 * KIB; at < info.data_offset && !repaired; at += 4 * KIB) {
        uint8_t *page = d.host.files[0].data + at;
        if (!page[0]) {
            continue;
        }
        page[100] ^= 0x40;
        struct fvd_image *image = image_new(&d.host, 0);
        struct mem_queue q;
        queue_init(&q, &d.host, image);
        bool is_open = do_open(&q) == 0;
        if (is_open && do_check(&q, &report) == 0 && report.corruptions > 0) {
            r = (struct result){ 0 };
            fvd_submit_check(q.queue, &report, 4, NULL, done, &r);
            CHECK_EQ(wait_for(&q, &r), -EINVAL);
            r = (struct result){ 0 };
            fvd_submit_check(q.queue, &report, FVD_CHECK_REPAIR_LEAKS, NULL, done, &r);
            CHECK_EQ(wait_for(&q, &r), 0);
            CHECK(report.corruptions == 1 && report.corruptions_fixed == 0);
            r = (struct result){ 0 };
            fvd_submit_check(q.queue, &report, FVD_CHECK_REPAIR_ALL, NULL, done, &r);
            CHECK_EQ(wait_for(&q, &r), 0);
            CHECK(report.corruptions == 0 && report.corruptions_fixed == 1);
            CHECK_EQ(report.lost_bytes, MIB);
            CHECK_EQ(do_check(&q, &report), 0);
            CHECK(report.corruptions == 0 && report.corruptions_fixed == 0);
            CHECK_EQ(report.blocks_present, 0);
            /* What the bitmap said is lost: the base shows. */
            check_base(&q, 64 * KIB, 0);
            repaired++;
        } else {
            page[100] ^= 0x40;
        }
        if (is_open) {
            CHECK_EQ(do_close(&q), 0);
        }
        queue_free(&q);
        fvd_image_free(&image);
    }
    CHECK_EQ(repaired, 1);
    /* Read-only it is refused. */
    disk_reopen(&d, FVD_OPEN_RDONLY);
    r = (struct result){ 0 };
    fvd_submit_check(d.q.queue, &report, FVD_CHECK_REPAIR_ALL, NULL, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EROFS);
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        later(mode);
        first(mode);
        findings = findings_at_done = 0;
        check(mode);
        repair(mode);
    }
    return 0;
}
