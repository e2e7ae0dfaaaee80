/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-31: ranges outside the disk. API-43: and a larger disk. */
#include "util.h"

#define SIZE (2 * MIB + 512)

static void bounds(enum mode mode)
{
    struct disk d;
    struct fvd_block_status status;
    struct fvd_mapping map;
    struct fvd_info info = { .struct_size = sizeof(info) };
    char buf[4096] = { 0 };
    static const struct {
        uint64_t offset, len;
    } bad[] = {
        { SIZE, 1 }, { SIZE - 1, 2 }, { SIZE - 511, 512 }, { SIZE + 4096, 512 }, { UINT64_MAX, 1 },
        { UINT64_MAX - 100, 4096 }, { (uint64_t)1 << 63, 512 }, { INT64_MAX, 512 },
    };
    disk_start(&d, mode, SIZE, MIB);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint64_t offset = bad[i].offset, len = bad[i].len;
        CHECK_EQ(do_read(&d.q, buf, len, offset), -EINVAL);
        CHECK_EQ(do_write(&d.q, buf, len, offset, 0), -EINVAL);
        CHECK_EQ(do_write_zeroes(&d.q, offset, len, 0), -EINVAL);
        CHECK_EQ(do_discard(&d.q, offset, len), -EINVAL);
        CHECK_EQ(do_status(&d.q, offset, len, &status), -EINVAL);
        CHECK_EQ(fvd_lookup(d.image, 0, offset, len, 0, &map), FVD_LOOKUP_ASK);
    }
    CHECK_EQ(do_write_zeroes(&d.q, 0, UINT64_MAX, 0), -EINVAL);
    CHECK_EQ(do_discard(&d.q, 1, UINT64_MAX), -EINVAL);
    /* Right at the end is fine. */
    CHECK_EQ(do_write(&d.q, buf, 512, SIZE - 512, 0), 0);
    CHECK_EQ(do_write(&d.q, buf, 1, SIZE - 1, 0), 0);
    CHECK_EQ(do_read(&d.q, buf, 4096, SIZE - 4096), 0);
    CHECK_EQ(do_read(&d.q, buf, 0, SIZE), 0);

    CHECK_EQ(do_resize(&d.q, 3 * MIB + 1, 0), -EINVAL);
    CHECK_EQ(do_resize(&d.q, UINT64_MAX & ~511ull, 0), -EINVAL);
    CHECK_EQ(do_resize(&d.q, 4 * MIB, FVD_REQ_ZEROED), 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK_EQ(info.virtual_size, 4 * MIB);
    check_bytes(&d.q, 0, 4 * MIB - SIZE, SIZE);
    CHECK_EQ(do_fill(&d.q, 5, 4096, 4 * MIB - 4096), 0);
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    CHECK_EQ(fvd_image_info(d.image, &info), 0);
    CHECK_EQ(info.virtual_size, 4 * MIB);
    check_bytes(&d.q, 5, 4096, 4 * MIB - 4096);
    check_base(&d.q, MIB, 0);
    disk_end(&d);
}

/* Sizes that a new image may not have. */
static void create_bounds(void)
{
    struct mem_host host;
    struct mem_queue q;
    struct fvd_create bad[] = {
        { .virtual_size = 513 },
        { .virtual_size = (uint64_t)1 << 63 },
        { .virtual_size = UINT64_MAX },
        { .virtual_size = MIB, .block_size = 5000, .base_name = "b", .base_format = "raw" },
        { .virtual_size = MIB, .block_size = 1024, .base_name = "b", .base_format = "raw" },
        { .virtual_size = MIB, .block_size = 4 << 20, .base_name = "b", .base_format = "raw" },
        { .virtual_size = MIB, .journal_size = 1, .base_name = "b", .base_format = "raw" },
        { .virtual_size = MIB, .journal_size = 1024 * MIB, .base_name = "b", .base_format = "raw" },
        { .virtual_size = MIB, .base_name = "b" },
        { .virtual_size = MIB, .base_format = "raw" },
    };
    mem_host_init(&host, INLINE);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct result r = { 0 };
        bad[i].struct_size = sizeof(bad[i]);
        fvd_submit_create(q.queue, &bad[i], done, &r);
        if (wait_for(&q, &r) != -EINVAL) {
            fprintf(stderr, "create %zu: %d %s\n", i, (int)r.ret, r.error);
            exit(1);
        }
    }
    char name[2000];
    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = 0;
    CHECK_EQ(do_create(&q, MIB, name), -EINVAL);
    /* The base's length is a size. */
    struct result r = { 0 };
    struct fvd_create params = { .struct_size = sizeof(params), .virtual_size = UINT64_MAX, .base_name = "b",
                                 .base_format = "raw" };
    mem_host_base(&host, MIB + 512);
    fvd_submit_create(q.queue, &params, done, &r);
    CHECK_EQ(wait_for(&q, &r), 0);
    CHECK_EQ(do_open(&q), 0);
    struct fvd_info info = { .struct_size = sizeof(info) };
    CHECK_EQ(fvd_image_info(image, &info), 0);
    CHECK_EQ(info.virtual_size, MIB + 512);
    CHECK_EQ(do_close(&q), 0);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        bounds(mode);
    }
    create_bounds();
    return 0;
}
