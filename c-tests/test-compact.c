/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Compact images: storage a chunk at a time. */
#include "util.h"

#include <sys/stat.h>
#include <unistd.h>

#define CHUNK (64 * KIB)
#define STEP (256 * KIB)
#define DISK (2 * MIB - 4 * KIB)

static struct fvd_create params(uint64_t size, const char *base)
{
    return (struct fvd_create){ .struct_size = sizeof(struct fvd_create), .virtual_size = size, .block_size = 4096,
                                .journal_size = MIB, .base_name = base, .base_format = base ? "raw" : NULL,
                                .flags = FVD_CREATE_COMPACT, .chunk_size = CHUNK, .storage_grow_unit = STEP };
}

static int64_t create(struct mem_queue *q, const struct fvd_create *p)
{
    struct result r = { 0 };
    fvd_submit_create(q->queue, p, done, &r);
    return wait_for(q, &r);
}

/* On a device if device_len is not 0. */
static void start(struct disk *d, enum mode mode, uint64_t base_len, uint64_t device_len)
{
    struct fvd_create p = params(DISK, base_len ? "base.raw" : NULL);
    memset(d, 0, sizeof(*d));
    mem_host_init(&d->host, mode);
    if (base_len) {
        mem_host_base(&d->host, base_len);
    }
    if (device_len) {
        mem_host_device(&d->host, device_len);
    }
    d->image = image_new(&d->host, 0);
    queue_init(&d->q, &d->host, d->image);
    CHECK_EQ(create(&d->q, &p), 0);
    CHECK_EQ(do_open(&d->q), 0);
}

static struct fvd_info info_of(struct disk *d)
{
    struct fvd_info info = { .struct_size = sizeof(info) };
    CHECK_EQ(fvd_image_info(d->image, &info), 0);
    return info;
}

static void check_all(struct disk *d, const uint8_t *want)
{
    uint8_t *buf = malloc(DISK);
    CHECK(buf);
    CHECK_EQ(do_read(&d->q, buf, DISK, 0), 0);
    if (memcmp(buf, want, DISK)) {
        uint64_t i = 0;
        while (buf[i] == want[i]) {
            i++;
        }
        fprintf(stderr, "byte %llu is %u, not %u\n", (unsigned long long)i, buf[i], want[i]);
        exit(1);
    }
    free(buf);
}

/* API-68 */
static void random_writes(enum mode mode, uint64_t base_len, uint64_t device_len)
{
    struct disk d;
    struct fvd_check found = { .struct_size = sizeof(found) };
    uint32_t seed = 12345 + (uint32_t)mode;
    uint8_t *want = malloc(DISK), *buf = malloc(200 * KIB);
    CHECK(want && buf);
    start(&d, mode, base_len, device_len);
    for (uint64_t i = 0; i < DISK; i++) {
        want[i] = i < base_len ? base_byte(i) : 0;
    }
    check_all(&d, want);
    for (int turn = 0; turn < 90; turn++) {
        seed = seed * 1664525 + 1013904223;
        uint64_t offset = seed % DISK;
        seed = seed * 1664525 + 1013904223;
        uint64_t len = turn % 3 ? seed % 5000 : seed % (200 * KIB);
        if (len > DISK - offset) {
            len = DISK - offset;
        }
        if (turn % 7 == 6) {
            CHECK_EQ(do_write_zeroes(&d.q, offset, len, turn % 2 ? FVD_REQ_MAY_UNMAP : 0), 0);
            memset(want + offset, 0, len);
        } else {
            memset(buf, turn + 1, len);
            CHECK_EQ(do_write(&d.q, buf, len, offset, 0), 0);
            memset(want + offset, turn + 1, len);
        }
        if (turn == 30) {
            CHECK_EQ(do_flush(&d.q), 0);
            disk_crash_and_reopen(&d);
            check_all(&d, want);
        }
    }
    check_all(&d, want);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_all(&d, want);
    CHECK_EQ(do_close(&d.q), 0);
    disk_reopen(&d, 0);
    CHECK(info_of(&d).flags & FVD_INFO_CLEAN);
    check_all(&d, want);
    CHECK_EQ(do_check(&d.q, &found), 0);
    CHECK_EQ(found.corruptions, 0);
    CHECK(found.chunks_allocated > 0 && found.chunks_allocated <= found.chunks_total);
    CHECK(found.chunks_fragmented < found.chunks_allocated);
    disk_end(&d);
    free(buf);
    free(want);
}

/* API-69 */
static void figures(enum mode mode)
{
    struct disk d;
    struct fvd_check found = { .struct_size = sizeof(found) };
    struct fvd_block_status status = { .struct_size = sizeof(status) };
    start(&d, mode, 0, 0);
    struct fvd_info info = info_of(&d);
    CHECK_EQ(info.chunk_size, CHUNK);
    CHECK_EQ(info.storage_grow_unit, STEP);
    CHECK_EQ(info.chunks, 32);
    CHECK_EQ(info.data_offset % CHUNK, 0);
    CHECK_EQ(info.reach, info.data_offset);
    /* Before the first write a base may still come. */
    CHECK_EQ(do_status(&d.q, 0, DISK, &status), 0);
    CHECK(status.place != FVD_PLACE_DATA);
    CHECK_EQ(status.len, DISK);
    CHECK_EQ(do_fill(&d.q, 5, 4096, 10 * CHUNK), 0);
    CHECK_EQ(do_fill(&d.q, 6, 4096, 3 * CHUNK + 100), 0);
    CHECK_EQ(do_status(&d.q, 0, DISK, &status), 0);
    CHECK_EQ(status.place, FVD_PLACE_ZERO);
    CHECK_EQ(status.len, 3 * CHUNK);
    CHECK_EQ(do_status(&d.q, 10 * CHUNK, DISK - 10 * CHUNK, &status), 0);
    CHECK_EQ(status.place, FVD_PLACE_DATA);
    CHECK_EQ(status.len, CHUNK);
    CHECK_EQ(status.offset, info.data_offset);
    CHECK_EQ(d.host.files[0].data[status.offset], 5);
    CHECK_EQ(do_check(&d.q, &found), 0);
    CHECK_EQ(found.chunks_total, 32);
    CHECK_EQ(found.chunks_allocated, 2);
    CHECK_EQ(found.image_end, info.data_offset + STEP);
    CHECK_EQ(d.host.files[0].len, info.data_offset + STEP);
    /* An image that is not compact has none of it. */
    disk_end(&d);
    disk_start(&d, mode, MIB, 0);
    info = info_of(&d);
    CHECK_EQ(info.chunk_size | info.storage_grow_unit | info.chunks | info.reach, 0);
    CHECK_EQ(do_check(&d.q, &found), 0);
    CHECK_EQ(found.chunks_total | found.chunks_allocated | found.chunks_fragmented, 0);
    disk_end(&d);
}

/* API-70 */
static void discards(enum mode mode)
{
    struct disk d;
    struct fvd_block_status status = { .struct_size = sizeof(status) };
    start(&d, mode, 0, 0);
    CHECK_EQ(do_fill(&d.q, 7, 8 * CHUNK, 0), 0);
    uint64_t len = d.host.files[0].len;
    CHECK_EQ(do_discard(&d.q, 100, 2 * CHUNK), 0);
    CHECK_EQ(do_status(&d.q, 0, CHUNK, &status), 0);
    CHECK_EQ(status.place, FVD_PLACE_DATA);
    check_bytes(&d.q, 7, 100, 0);
    CHECK_EQ(do_status(&d.q, CHUNK, CHUNK, &status), 0);
    CHECK_EQ(status.place, FVD_PLACE_ZERO);
    CHECK_EQ(do_write_zeroes(&d.q, 4 * CHUNK, 2 * CHUNK, FVD_REQ_MAY_UNMAP), 0);
    mem_host_reset_counts(&d.host);
    CHECK_EQ(do_flush(&d.q), 0);
    run(&d.q);
    CHECK(d.host.ops[DISCARD] > 0);
    check_bytes(&d.q, 0, CHUNK, CHUNK);
    check_bytes(&d.q, 0, 2 * CHUNK, 4 * CHUNK);
    check_bytes(&d.q, 7, 2 * CHUNK, 6 * CHUNK);
    /* Storage that was freed comes before new storage. */
    CHECK_EQ(do_fill(&d.q, 8, 3 * CHUNK, 20 * CHUNK), 0);
    CHECK_EQ(d.host.files[0].len, len);
    check_bytes(&d.q, 8, 3 * CHUNK, 20 * CHUNK);
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    check_bytes(&d.q, 0, CHUNK, CHUNK);
    check_bytes(&d.q, 8, 3 * CHUNK, 20 * CHUNK);
    disk_end(&d);
}

/* API-73 */
static void discards_in_place(enum mode mode)
{
    struct disk d;
    struct fvd_check before = { .struct_size = sizeof(before) }, after = before;
    start(&d, mode, 0, 0);
    disk_reopen(&d, FVD_OPEN_DISCARD_NO_UNREF);
    CHECK_EQ(do_fill(&d.q, 7, 8 * CHUNK, 0), 0);
    CHECK_EQ(do_check(&d.q, &before), 0);
    CHECK_EQ(before.chunks_allocated, 8);
    mem_host_reset_counts(&d.host);
    CHECK_EQ(do_discard(&d.q, CHUNK, 2 * CHUNK), 0);
    CHECK(d.host.ops[DISCARD] > 0);
    CHECK_EQ(do_write_zeroes(&d.q, 4 * CHUNK, 2 * CHUNK, FVD_REQ_MAY_UNMAP), 0);
    check_bytes(&d.q, 0, 2 * CHUNK, 4 * CHUNK);
    CHECK_EQ(do_fill(&d.q, 9, 2 * CHUNK, CHUNK), 0);
    check_bytes(&d.q, 9, 2 * CHUNK, CHUNK);
    CHECK_EQ(do_check(&d.q, &after), 0);
    CHECK_EQ(after.chunks_allocated, 8);
    CHECK_EQ(after.chunks_fragmented, before.chunks_fragmented);
    CHECK_EQ(after.image_end, before.image_end);
    disk_end(&d);
}

/* Old data, more of it. */
static void enlarge(struct mem_host *host, uint64_t by)
{
    struct mem_file *f = &host->files[FVD_FILE_IMAGE];
    uint64_t len = f->len;
    struct op op = { .token = 1, .kind = TRUNCATE, .file = FVD_FILE_IMAGE, .offset = len + by };
    CHECK_EQ(do_op(host, &op), 0);
    memset(f->data + len, 0xd7, by);
}

/* API-71 */
static void full_device(enum mode mode)
{
    struct disk d;
    uint64_t written;
    start(&d, mode, 0, 4 * MIB);
    for (written = 0; written < DISK; written += CHUNK) {
        uint64_t n = DISK - written < CHUNK ? DISK - written : CHUNK;
        int64_t ret = do_fill(&d.q, (uint8_t)(1 + written / CHUNK), n, written);
        if (ret < 0) {
            CHECK_EQ(ret, -ENOSPC);
            /* Again and again, and nothing else is disturbed. */
            CHECK_EQ(do_fill(&d.q, 99, 512, written), -ENOSPC);
            CHECK_EQ(do_flush(&d.q), 0);
            if (written) {
                check_bytes(&d.q, (uint8_t)(written / CHUNK), CHUNK, written - CHUNK);
                CHECK_EQ(do_fill(&d.q, (uint8_t)(written / CHUNK), 512, written - CHUNK), 0);
            }
            check_bytes(&d.q, 0, n, written);
            enlarge(&d.host, CHUNK + 4096);
            CHECK_EQ(do_fill(&d.q, (uint8_t)(1 + written / CHUNK), n, written), 0);
        }
    }
    CHECK_EQ(do_flush(&d.q), 0);
    disk_crash_and_reopen(&d);
    for (written = 0; written < DISK; written += CHUNK) {
        uint64_t n = DISK - written < CHUNK ? DISK - written : CHUNK;
        check_bytes(&d.q, (uint8_t)(1 + written / CHUNK), n, written);
    }
    disk_end(&d);
}

static struct {
    unsigned calls;
    uint64_t free, wanted;
} told;

static void low_space(void *queue_opaque, uint64_t free, uint64_t wanted)
{
    (void)queue_opaque;
    told.calls++;
    told.free = free;
    told.wanted = wanted;
}

/* Begins a write of len bytes; r says how it ends. */
static void begin_fill(struct mem_queue *q, struct iovec *iov, uint64_t offset, struct result *r)
{
    memset(r, 0, sizeof(*r));
    fvd_submit_write(q->queue, offset, iov, 1, 0, done, r);
    run(q);
}

/* API-74, API-75: how a wait ends */
static void waiting_for_space(enum mode mode, int end)
{
    struct disk d;
    struct result r, other;
    struct iovec iov = { .iov_len = DISK };
    iov.iov_base = malloc(iov.iov_len);
    CHECK(iov.iov_base);
    memset(iov.iov_base, 0x66, iov.iov_len);
    start(&d, mode, 0, 4 * MIB);
    CHECK_EQ(do_close(&d.q), 0);
    d.host.callbacks.low_space = low_space;
    disk_reopen(&d, FVD_OPEN_WAIT_FOR_SPACE);

    memset(&told, 0, sizeof(told));
    begin_fill(&d.q, &iov, 0, &r);
    CHECK_EQ(r.calls, 0);
    CHECK_EQ(told.calls, 1);
    CHECK(told.wanted >= CHUNK && told.wanted <= STEP);
    /* Nothing else waits. */
    CHECK_EQ(do_flush(&d.q), 0);
    check_bytes(&d.q, 0, 512, DISK - 512);
    switch (end) {
    case 0:
        /* An answer without storage asks once more. */
        CHECK_EQ(fvd_image_space_changed(d.image, 0), 0);
        run(&d.q);
        CHECK_EQ(r.calls, 0);
        CHECK_EQ(told.calls, 2);
        CHECK_EQ(told.free, 0);
        enlarge(&d.host, 2 * MIB);
        CHECK_EQ(fvd_image_space_changed(d.image, 0), 0);
        CHECK_EQ(wait_for(&d.q, &r), 0);
        check_bytes(&d.q, 0x66, iov.iov_len, 0);
        break;
    case 1:
        CHECK_EQ(fvd_image_space_changed(d.image, -ENOSPC), 0);
        CHECK_EQ(wait_for(&d.q, &r), -ENOSPC);
        /* The next one asks and waits again. */
        begin_fill(&d.q, &iov, 0, &r);
        CHECK_EQ(r.calls, 0);
        CHECK_EQ(told.calls, 2);
        enlarge(&d.host, 2 * MIB);
        CHECK_EQ(fvd_image_space_changed(d.image, 0), 0);
        CHECK_EQ(wait_for(&d.q, &r), 0);
        break;
    case 2:
        CHECK_EQ(fvd_image_wait_for_space(d.image, 0), 0);
        CHECK_EQ(wait_for(&d.q, &r), -ENOSPC);
        begin_fill(&d.q, &iov, 0, &r);
        CHECK_EQ(wait_for(&d.q, &r), -ENOSPC);
        break;
    case 3:
        memset(&other, 0, sizeof(other));
        fvd_submit_close(d.q.queue, done, &other);
        CHECK_EQ(wait_for(&d.q, &other), 0);
        CHECK_EQ(wait_for(&d.q, &r), -ENOSPC);
        disk_reopen(&d, 0);
        break;
    }
    disk_end(&d);
    CHECK_EQ(fvd_image_space_changed(NULL, 0), -EINVAL);
    CHECK_EQ(fvd_image_wait_for_space(NULL, 0), -EINVAL);
    free(iov.iov_base);
}

static void wrong_parameters(void)
{
    struct disk d;
    disk_start(&d, INLINE, MIB, 0);
    CHECK_EQ(do_close(&d.q), 0);
    queue_free(&d.q);
    fvd_image_free(&d.image);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    for (int i = 0; i < 8; i++) {
        struct fvd_create p = params(MIB, NULL);
        switch (i) {
        case 0: p.flags = 2; break;
        case 1: p.flags = 0; break;
        case 2: p.flags = 0; p.chunk_size = 0; break;
        case 3: p.chunk_size = 32 * KIB; break;
        case 4: p.chunk_size = 100 * 1000; break;
        case 5: p.chunk_size = 128 * MIB; break;
        case 6: p.storage_grow_unit = CHUNK + 4096; break;
        case 7: p.block_size = 128 * KIB; break;
        }
        CHECK_EQ(create(&d.q, &p), -EINVAL);
    }
    /* The default fits the block. */
    struct fvd_create p = params(8 * MIB, "gone.raw");
    p.block_size = 2 * MIB;
    p.chunk_size = 0;
    p.storage_grow_unit = 0;
    CHECK_EQ(create(&d.q, &p), 0);
    CHECK_EQ(do_open(&d.q), 0);
    CHECK_EQ(info_of(&d).chunk_size, 2 * MIB);
    CHECK_EQ(info_of(&d).storage_grow_unit, 64 * MIB);
    disk_end(&d);
}

/* API-80, API-7 */
static void amended(enum mode mode)
{
    struct disk d;
    struct fvd_amend a = { .struct_size = sizeof(a) };
    uint8_t *buf = malloc(STEP);
    CHECK(buf);
    memset(buf, 0x33, STEP);
    start(&d, mode, MIB, 0);
    struct fvd_info info = info_of(&d);
    CHECK_EQ(do_amend(&d.q, &a), 0);
    CHECK_EQ(do_amend(&d.q, NULL), -EINVAL);
    /* What it has. */
    a = (struct fvd_amend){ .struct_size = sizeof(a), .given = 31, .flags = FVD_CREATE_COMPACT, .storage_grow_unit = STEP,
                            .chunk_size = CHUNK, .block_size = info.block_size, .journal_size = info.journal_size };
    CHECK_EQ(do_amend(&d.q, &a), 0);
    CHECK_EQ(info_of(&d).generation, info.generation);
    /* One wrong value, and nothing changes. */
    a.storage_grow_unit = 2 * CHUNK;
    for (int i = 0; i < 9; i++) {
        struct fvd_amend b = a;
        int64_t want = -ENOTSUP;
        switch (i) {
        case 0: b.flags = 0; break;
        case 1: b.chunk_size *= 2; break;
        case 2: b.block_size = 0; break;
        case 3: b.journal_size += 64 * KIB; break;
        case 4: b.storage_grow_unit = CHUNK + 4096; want = -EINVAL; break;
        case 5: b.storage_grow_unit = 0; want = -EINVAL; break;
        case 6: b.storage_grow_unit = UINT64_MAX; want = -EINVAL; break;
        case 7: b.given |= 32; want = -EINVAL; break;
        case 8: b.flags |= 2; want = -EINVAL; break;
        }
        CHECK_EQ(do_amend(&d.q, &b), want);
        CHECK_EQ(info_of(&d).storage_grow_unit, STEP);
    }
    CHECK_EQ(info_of(&d).generation, info.generation);
    CHECK_EQ(do_write(&d.q, buf, CHUNK, 0, 0), 0);
    a.storage_grow_unit = 3 * STEP;
    CHECK_EQ(do_amend(&d.q, &a), 0);
    CHECK_EQ(info_of(&d).storage_grow_unit, 3 * STEP);
    /* Durable without a flush, and right for the steps that follow. */
    disk_crash_and_reopen(&d);
    CHECK_EQ(info_of(&d).storage_grow_unit, 3 * STEP);
    CHECK_EQ(info_of(&d).reach, info.data_offset + STEP);
    CHECK_EQ(do_write(&d.q, buf, STEP, 0, 0), 0);
    CHECK_EQ(do_write(&d.q, buf, STEP, STEP, FVD_REQ_FUA), 0);
    CHECK_EQ(do_close(&d.q), 0);
    CHECK_EQ(info_of(&d).reach, info.data_offset + STEP + 3 * STEP);
    disk_end(&d);
    free(buf);
}

/* API-80 */
static void amended_flat(void)
{
    struct disk d;
    struct fvd_amend a = { .struct_size = sizeof(a), .given = FVD_AMEND_STORAGE_GROW_UNIT, .storage_grow_unit = STEP };
    disk_start(&d, INLINE, MIB, 0);
    CHECK_EQ(do_amend(&d.q, &a), -ENOTSUP);
    a.given = FVD_AMEND_FLAGS | FVD_AMEND_CHUNK_SIZE;
    CHECK_EQ(do_amend(&d.q, &a), 0);
    a.flags = FVD_CREATE_COMPACT;
    CHECK_EQ(do_amend(&d.q, &a), -ENOTSUP);
    disk_end(&d);
}

static void wait_file(struct fvd_file *file, struct result *r)
{
    while (!r->calls) {
        CHECK(fvd_file_process(file, 1000) >= 0);
    }
    CHECK_EQ(r->ret, 0);
}

static uint64_t blocks_of(const char *path)
{
    struct stat st;
    CHECK_EQ(stat(path, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

/* API-70: the file gets smaller, too. */
static void file_host(void)
{
    const char *path = temp_name("compact.fvd");
    struct fvd_create p = params(64 * MIB, NULL);
    struct fvd_file *file = NULL;
    struct result r = { 0 };
    uint8_t *buf = malloc(16 * MIB), *back = malloc(16 * MIB);
    CHECK(buf && back);
    memset(buf, 0x5a, 16 * MIB);
    CHECK_EQ(fvd_file_create(path, &p, NULL), 0);
    CHECK_EQ(fvd_file_open(path, NULL, &file), 0);
    CHECK_EQ(fvd_file_pwrite(file, buf, 16 * MIB, 4 * MIB), 16 * MIB);
    CHECK_EQ(fvd_file_flush(file), 0);
    uint64_t full = blocks_of(path);
    CHECK(full >= 16 * MIB);
    fvd_submit_discard(fvd_file_queue(file), 4 * MIB, 12 * MIB, done, &r);
    wait_file(file, &r);
    CHECK_EQ(fvd_file_close(&file), 0);
    uint64_t after = blocks_of(path);
    if (after > full - 11 * MIB) {
        fprintf(stderr, "%llu of %llu bytes are left: holes cannot be made here?\n", (unsigned long long)after,
                (unsigned long long)full);
    }
    CHECK_EQ(fvd_file_open(path, NULL, &file), 0);
    CHECK_EQ(fvd_file_pread(file, back, 16 * MIB, 4 * MIB), 16 * MIB);
    memset(buf, 0, 12 * MIB);
    CHECK(!memcmp(buf, back, 16 * MIB));
    CHECK_EQ(fvd_file_close(&file), 0);
    CHECK_EQ(unlink(path), 0);
    CHECK(after <= full - 11 * MIB);
    free(buf);
    free(back);
}

int main(void)
{
    for (enum mode mode = 0; mode < MODES; mode++) {
        random_writes(mode, 0, 0);
        random_writes(mode, MIB + 512, 0);
        random_writes(mode, 0, 8 * MIB);
        random_writes(mode, 2 * MIB, 8 * MIB);
        figures(mode);
        discards(mode);
        discards_in_place(mode);
        full_device(mode);
        for (int end = 0; end < 4; end++) {
            waiting_for_space(mode, end);
        }
        amended(mode);
    }
    amended_flat();
    wrong_parameters();
    file_host();
    return 0;
}
