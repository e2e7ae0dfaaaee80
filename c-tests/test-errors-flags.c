/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Flags, sizes of structs, limits, required callbacks. */
#include "util.h"

static int try_new(const struct fvd_host_ops *ops, const struct fvd_config *config)
{
    struct fvd_image *image = NULL;
    int ret = fvd_image_new(ops, config, &image);
    CHECK((ret == 0) == (image != NULL));
    CHECK(ret == 0 || strlen(fvd_error()) > 0);
    fvd_image_free(&image);
    return ret;
}

/* API-30 */
static void flags(void)
{
    struct disk d;
    struct result r = { 0 };
    char buf[512] = { 0 };
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    disk_start(&d, INLINE, MIB, MIB);
    for (uint32_t bit = 0; bit < 32; bit++) {
        uint32_t flag = (uint32_t)1 << bit;
        r = (struct result){ 0 };
        fvd_submit_read(d.q.queue, 0, &iov, 1, flag, done, &r);
        CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
        CHECK_EQ(do_write(&d.q, buf, 512, 0, flag), flag == FVD_REQ_FUA ? 0 : -EINVAL);
        CHECK_EQ(do_write_zeroes(&d.q, 0, 512, flag), flag & (FVD_REQ_FUA | FVD_REQ_MAY_UNMAP) ? 0 : -EINVAL);
        CHECK_EQ(do_resize(&d.q, MIB, flag), flag == FVD_REQ_ZEROED ? 0 : -EINVAL);
        struct fvd_config config = { .struct_size = sizeof(config), .flags = flag };
        uint32_t modes = FVD_OPEN_RDONLY | FVD_OPEN_NO_IO | FVD_OPEN_DISCARD_NO_UNREF | FVD_OPEN_WAIT_FOR_SPACE | FVD_OPEN_METADATA;
        CHECK_EQ(try_new(&d.host.callbacks, &config), flag & modes ? 0 : -EINVAL);
        struct fvd_file_options options = { .struct_size = sizeof(options), .flags = flag };
        struct fvd_file *file;
        uint32_t known = modes | FVD_FILE_DIRECT | FVD_FILE_NO_LOCK | FVD_FILE_ALLOW_BASE | FVD_FILE_ALLOW_DATA;
        CHECK_EQ(fvd_file_open("/nonexistent/x", &options, &file), flag & known ? -ENOENT : -EINVAL);
        struct fvd_mapping map;
        int found = fvd_lookup(d.image, 0, 0, 512, flag, &map);
        CHECK_EQ(found, flag == FVD_LOOKUP_WRITE ? FVD_LOOKUP_DATA : FVD_LOOKUP_ASK);
        if (found == FVD_LOOKUP_DATA) {
            fvd_end(d.image, map.token);
        }
    }
    struct fvd_create params = { .struct_size = sizeof(params), .virtual_size = MIB, .preallocation = 4 };
    r = (struct result){ 0 };
    fvd_submit_create(d.q.queue, &params, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    disk_end(&d);
}

/* API-33 */
static void required(void)
{
    struct mem_host host;
    struct fvd_config config = { .struct_size = sizeof(config) };
    mem_host_init(&host, INLINE);
    struct fvd_host_ops all = host.callbacks, ops;
    CHECK_EQ(try_new(&all, &config), 0);
#define WITHOUT(member, expected)             \
    ops = all;                                \
    ops.member = NULL;                        \
    CHECK_EQ(try_new(&ops, &config), expected)
    WITHOUT(read, -EINVAL);
    WITHOUT(write, -EINVAL);
    WITHOUT(flush, -EINVAL);
    WITHOUT(get_length, -EINVAL);
    WITHOUT(wake, -EINVAL);
    WITHOUT(write_zeroes, 0);
    WITHOUT(discard, 0);
    WITHOUT(truncate, 0);
    WITHOUT(base_status, 0);
    WITHOUT(now_ns, 0);
    WITHOUT(random_bytes, 0);
    WITHOUT(set_timer, 0);
    WITHOUT(log, 0);
#undef WITHOUT
    struct fvd_limits good = { .struct_size = sizeof(good), .request_alignment = 512, .memory_alignment = 4096,
                               .write_granule = 65536, .flags = 7 };
#define WITH(member, value, expected)          \
    config.limits[1] = good;                   \
    config.limits[1].member = value;           \
    CHECK_EQ(try_new(&all, &config), expected)
    WITH(request_alignment, 512, 0);
    WITH(request_alignment, 0, 0);
    WITH(request_alignment, 3, -EINVAL);
    WITH(request_alignment, 8192, -EINVAL);
    WITH(memory_alignment, 513, -EINVAL);
    WITH(memory_alignment, 65536, -EINVAL);
    WITH(write_granule, 131072, -EINVAL);
    WITH(flags, 8, -EINVAL);
    WITH(reserved, 1, -EINVAL);
    WITH(struct_size, 0, -EINVAL);
    WITH(struct_size, 28, -EINVAL);
#undef WITH
    config.limits[1] = good;
    config.reserved = 1;
    CHECK_EQ(try_new(&all, &config), -EINVAL);
    mem_host_free(&host);
}

/* API-32: structs of other sizes than the library's. */
static void sizes(void)
{
    struct disk d;
    struct result r = { 0 };
    struct fvd_config config = { .struct_size = sizeof(config) };
    disk_start(&d, INLINE, MIB, MIB);

    struct {
        struct fvd_host_ops ops;
        void *later[4];
    } ops = { .ops = d.host.callbacks };
    /* An older program: up to wake only. */
    ops.ops.struct_size = offsetof(struct fvd_host_ops, now_ns);
    CHECK_EQ(try_new(&ops.ops, &config), 0);
    ops.ops.struct_size -= 8;
    CHECK_EQ(try_new(&ops.ops, &config), -EINVAL);
    /* A newer one: functions that this library does not know are left alone. */
    ops.ops.struct_size = sizeof(ops);
    ops.later[0] = &ops;
    CHECK_EQ(try_new(&ops.ops, &config), 0);
    ops.ops.struct_size = 0;
    CHECK_EQ(try_new(&ops.ops, &config), -EINVAL);
    ops.ops.struct_size = (size_t)1 << 40;
    CHECK_EQ(try_new(&ops.ops, &config), -EINVAL);

    struct {
        struct fvd_config config;
        uint64_t later[2];
    } newer = { .config = { .struct_size = sizeof(newer) } };
    CHECK_EQ(try_new(&d.host.callbacks, &newer.config), 0);
    newer.later[1] = 1;
    CHECK_EQ(try_new(&d.host.callbacks, &newer.config), -E2BIG);
    newer.config.struct_size = offsetof(struct fvd_config, limits);
    CHECK_EQ(try_new(&d.host.callbacks, &newer.config), 0);
    newer.config.struct_size = 8;
    CHECK_EQ(try_new(&d.host.callbacks, &newer.config), -EINVAL);

    /* Answers: only what fits, and zero what is not known. */
    struct {
        struct fvd_info info;
        uint64_t later[2];
    } info;
    memset(&info, 0xee, sizeof(info));
    info.info.struct_size = sizeof(info);
    CHECK_EQ(fvd_image_info(d.image, &info.info), 0);
    CHECK_EQ(info.info.struct_size, sizeof(info));
    CHECK_EQ(info.info.virtual_size, MIB);
    CHECK_EQ(info.later[0] | info.later[1], 0);
    memset(&info, 0xee, sizeof(info));
    info.info.struct_size = offsetof(struct fvd_info, generation);
    CHECK_EQ(fvd_image_info(d.image, &info.info), 0);
    CHECK_EQ(info.info.virtual_size, MIB);
    CHECK_EQ(info.info.generation, 0xeeeeeeeeeeeeeeee);

    struct fvd_block_status status;
    memset(&status, 0xee, sizeof(status));
    status.struct_size = offsetof(struct fvd_block_status, len);
    fvd_submit_block_status(d.q.queue, 0, 512, &status, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    CHECK_EQ(status.place, FVD_PLACE_BASE);
    CHECK_EQ(status.len, 0xeeeeeeeeeeeeeeee);
    r = (struct result){ 0 };
    status.struct_size = 0;
    fvd_submit_block_status(d.q.queue, 0, 512, &status, done, &r);
    CHECK_EQ(wait_for(&d.q, &r), -EINVAL);
    disk_end(&d);

    /* A create from before there were journals. */
    struct mem_host host;
    struct mem_queue q;
    struct fvd_create params;
    mem_host_init(&host, INLINE);
    struct fvd_image *image = image_new(&host, 0);
    queue_init(&q, &host, image);
    memset(&params, 0xee, sizeof(params));
    params.struct_size = offsetof(struct fvd_create, journal_size);
    params.virtual_size = MIB;
    params.block_size = 0;
    params.preallocation = 0;
    r = (struct result){ 0 };
    fvd_submit_create(q.queue, &params, done, &r);
    CHECK_EQ(wait_for(&q, &r), 0);
    queue_free(&q);
    fvd_image_free(&image);
    mem_host_free(&host);
}

int main(void)
{
    flags();
    required();
    sizes();
    return 0;
}
