/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Pass-through: API-55 to API-59, and API-12. */
#include "util.h"

#include <malloc.h>

/* Does what a host does with an answer. */
static void io_at(struct mem_host *host, const struct fvd_mapping *map, enum op_kind kind, void *buf, size_t len)
{
    struct iovec iov = { .iov_base = buf, .iov_len = len };
    struct op op = { .token = 1, .kind = kind, .file = map->file, .offset = map->offset, .len = len,
                     .iov = &iov, .iovcnt = 1 };
    CHECK_EQ(do_op(host, &op), 0);
}

/* API-55, API-56 */
static void places(enum mode mode)
{
    struct disk d;
    struct fvd_mapping map;
    uint8_t buf[64 * KIB];
    disk_start(&d, mode, 4 * MIB, MIB);
    /* In the base. */
    memset(&map, 0xee, sizeof(map));
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 4096, 0, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 4096, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(fvd_lookup(d.image, 0, 4 * MIB, 1, 0, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(fvd_lookup(d.image, 0, 0, 0, 0, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(map.len, 0xeeeeeeeeeeeeeeee);
    CHECK_EQ(map.token, 0xeeeeeeee);
    /* Present. */
    CHECK_EQ(do_fill(&d.q, 7, 16384, 4096), 0);
    for (uint64_t at = 4096; at < 20480; at += map.len) {
        CHECK_EQ(fvd_lookup(d.image, 5, at, 20480 - at, 0, &map), FVD_LOOKUP_DATA);
        CHECK(map.len >= 1 && map.len <= 20480 - at);
        CHECK_EQ(map.file, FVD_FILE_IMAGE);
        io_at(&d.host, &map, READ, buf, map.len);
        for (uint64_t i = 0; i < map.len; i++) {
            CHECK_EQ(buf[i], 7);
        }
        fvd_end(d.image, map.token);
    }
    /* Only as far as it is present. */
    CHECK_EQ(fvd_lookup(d.image, 99999, 4096, 64 * KIB, 0, &map), FVD_LOOKUP_DATA);
    CHECK_EQ(map.len, 16384);
    fvd_end(d.image, map.token);
    /* Writing there is writing the disk. */
    CHECK_EQ(fvd_lookup(d.image, 1, 8192 + 512, 1024, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_DATA);
    CHECK_EQ(map.len, 1024);
    memset(buf, 8, 1024);
    io_at(&d.host, &map, WRITE, buf, 1024);
    fvd_end(d.image, map.token);
    check_bytes(&d.q, 8, 1024, 8192 + 512);
    check_bytes(&d.q, 7, 512, 8192);
    /* Past the base. */
    CHECK_EQ(fvd_lookup(d.image, 1, 2 * MIB, MIB, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_DATA);
    CHECK_EQ(map.len, MIB);
    fvd_end(d.image, map.token);
    /* A flush covers it. */
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 8, 1024, 8192 + 512);
    CHECK_EQ(do_close(&d.q), 0);
    CHECK_EQ(fvd_lookup(d.image, 1, 2 * MIB, MIB, 0, &map), FVD_LOOKUP_ASK);
    disk_reopen(&d, FVD_OPEN_RDONLY);
    CHECK_EQ(fvd_lookup(d.image, 1, 2 * MIB, MIB, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_ASK);
    CHECK_EQ(do_close(&d.q), 0);
    disk_end(&d);
}

/* API-59 */
static void no_allocation(void)
{
#if !defined(__SANITIZE_ADDRESS__)
    struct disk d;
    struct fvd_mapping map;
    disk_start(&d, INLINE, 4 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    struct mallinfo2 before = mallinfo2();
    for (uint32_t i = 0; i < 1000; i++) {
        CHECK_EQ(fvd_lookup(d.image, i, i % 16 * 4096, 4096, i % 2, &map), FVD_LOOKUP_DATA);
        struct mallinfo2 within = mallinfo2();
        CHECK_EQ(within.uordblks, before.uordblks);
        fvd_end(d.image, map.token);
        CHECK_EQ(fvd_lookup(d.image, i, 512 * KIB, 4096, 0, &map), FVD_LOOKUP_ASK);
    }
    struct mallinfo2 after = mallinfo2();
    CHECK_EQ(after.uordblks, before.uordblks);
    disk_end(&d);
#endif
}

struct ender {
    struct fvd_image *image;
    uint32_t token;
};

static void *end_thread(void *opaque)
{
    struct ender *e = opaque;
    fvd_end(e->image, e->token);
    return NULL;
}

/* API-57: ended by another thread, after the place was held for a while. */
static void ended_elsewhere(void)
{
    struct disk d;
    struct ender e;
    struct fvd_mapping map;
    struct result r = { 0 };
    pthread_t thread;
    disk_start(&d, QUEUED, 4 * MIB, MIB);
    CHECK_EQ(do_fill(&d.q, 1, 64 * KIB, 0), 0);
    CHECK_EQ(fvd_lookup(d.image, 3, 0, 4096, FVD_LOOKUP_WRITE, &map), FVD_LOOKUP_DATA);
    e = (struct ender){ d.image, map.token };
    /* What changes the image meanwhile does not move it. */
    CHECK_EQ(do_fill(&d.q, 2, 4096, 256 * KIB), 0);
    CHECK_EQ(do_flush(&d.q), 0);
    uint8_t byte = 9;
    struct fvd_mapping first = map;
    first.len = 1;
    io_at(&d.host, &first, WRITE, &byte, 1);
    fvd_submit_close(d.q.queue, done, &r);
    run(&d.q);
    CHECK_EQ(pthread_create(&thread, NULL, end_thread, &e), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(wait_for(&d.q, &r), 0);
    disk_reopen(&d, 0);
    check_bytes(&d.q, 9, 1, 0);
    check_bytes(&d.q, 1, 4095, 1);
    disk_end(&d);
}

/* API-12: lookups on other threads while one writes block after block. */
struct reader {
    struct disk *d;
    uint32_t slot;
    _Atomic bool *stop;
    unsigned long found, asked;
};

static void *reader_thread(void *opaque)
{
    struct reader *r = opaque;
    struct fvd_info info = { .struct_size = sizeof(info) };
    uint64_t at = r->slot * 4096;
    while (!*r->stop) {
        struct fvd_mapping map;
        at = (at + 20480) % MIB;
        if (fvd_lookup(r->d->image, r->slot, at, 4096, 0, &map) == FVD_LOOKUP_DATA) {
            uint8_t buf[4096];
            io_at(&r->d->host, &map, READ, buf, map.len);
            /* A block that is present holds what its one writer wrote, never the base or zeroes. */
            for (uint64_t i = 0; i < map.len; i++) {
                CHECK_EQ(buf[i], (at / 4096) % 250 + 1);
            }
            fvd_end(r->d->image, map.token);
            r->found++;
        } else {
            r->asked++;
        }
        CHECK_EQ(fvd_image_info(r->d->image, &info), 0);
    }
    return NULL;
}

static void concurrent(void)
{
    struct disk d;
    struct reader readers[2];
    pthread_t threads[2];
    _Atomic bool stop = false;
    disk_start(&d, QUEUED, 4 * MIB, MIB);
    for (uint32_t i = 0; i < 2; i++) {
        readers[i] = (struct reader){ .d = &d, .slot = i + 1, .stop = &stop };
        CHECK_EQ(pthread_create(&threads[i], NULL, reader_thread, &readers[i]), 0);
    }
    for (unsigned round = 0; round < 2; round++) {
        for (uint64_t block = 0; block < 256; block++) {
            CHECK_EQ(do_fill(&d.q, (uint8_t)(block % 250 + 1), 4096, block * 4096), 0);
            if (block % 16 == 0) {
                CHECK_EQ(do_flush(&d.q), 0);
            }
        }
    }
    stop = true;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    }
    CHECK_EQ(do_flush(&d.q), 0);
    for (uint64_t block = 0; block < 256; block++) {
        check_bytes(&d.q, (uint8_t)(block % 250 + 1), 4096, block * 4096);
    }
    disk_end(&d);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        places(mode);
    }
    no_allocation();
    ended_elsewhere();
    concurrent();
    return 0;
}
