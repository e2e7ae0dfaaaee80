/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* API-38, API-46: data of any size, offset and shape, against a copy in memory. */
#include "util.h"

#define SIZE (2 * MIB)
#define BASE (MIB + 777 * 512)

static uint64_t seed;

static uint64_t next(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 33) % below;
}

/* Memory cut into pieces of odd lengths at odd addresses. */
struct shape {
    uint8_t *memory;
    struct iovec iov[8];
    int count;
};

static void shape_make(struct shape *s, size_t len, bool aligned)
{
    size_t left = len;
    s->memory = NULL;
    CHECK_EQ(posix_memalign((void **)&s->memory, 4096, len + 64 * 8 + 1), 0);
    uint8_t *at = s->memory + (aligned ? 0 : next(16));
    for (s->count = 0; left > 0 && s->count < 7; s->count++) {
        size_t n = aligned || s->count == 6 ? left : next(left + 1);
        s->iov[s->count] = (struct iovec){ .iov_base = at, .iov_len = n };
        at += n + (aligned ? 0 : next(9));
        left -= n;
    }
    if (left > 0) {
        s->iov[s->count++] = (struct iovec){ .iov_base = at, .iov_len = left };
    }
}

static void random_operations(enum mode mode, uint32_t align, uint64_t with_seed)
{
    struct disk d;
    uint8_t *copy = malloc(SIZE);
    CHECK(copy);
    seed = with_seed;
    memset(&d, 0, sizeof(d));
    mem_host_init(&d.host, mode);
    d.host.limits.request_alignment = align;
    d.host.limits.memory_alignment = align;
    mem_host_base(&d.host, BASE);
    d.image = image_new(&d.host, 0);
    queue_init(&d.q, &d.host, d.image);
    CHECK_EQ(do_create(&d.q, SIZE, "base.raw"), 0);
    CHECK_EQ(do_open(&d.q), 0);
    for (uint64_t i = 0; i < SIZE; i++) {
        copy[i] = i < BASE ? base_byte(i) : 0;
    }
    for (int round = 0; round < 300; round++) {
        struct shape s;
        struct result r = { 0 };
        size_t len = next(8) ? 1 + next(20000) : 1 + next(200000);
        uint64_t offset = next(SIZE - len + 1);
        if (next(3) == 0) {
            /* Sectors, as guests do. */
            offset &= ~511ull;
            len = (len + 511) & ~511ull;
            if (offset + len > SIZE) {
                len = SIZE - offset;
            }
        }
        shape_make(&s, len, next(4) == 0);
        uint64_t at = offset;
        if (next(2)) {
            for (int i = 0; i < s.count; i++) {
                for (size_t j = 0; j < s.iov[i].iov_len; j++) {
                    ((uint8_t *)s.iov[i].iov_base)[j] = copy[at++] = (uint8_t)next(256);
                }
            }
            fvd_submit_write(d.q.queue, offset, s.iov, s.count, next(4) ? 0 : FVD_REQ_FUA, done, &r);
            CHECK_EQ(wait_for(&d.q, &r), 0);
        } else {
            fvd_submit_read(d.q.queue, offset, s.iov, s.count, 0, done, &r);
            CHECK_EQ(wait_for(&d.q, &r), 0);
            for (int i = 0; i < s.count; i++) {
                CHECK(!memcmp(s.iov[i].iov_base, copy + at, s.iov[i].iov_len));
                at += s.iov[i].iov_len;
            }
        }
        free(s.memory);
        if (round % 100 == 50) {
            CHECK_EQ(do_flush(&d.q), 0);
        }
        if (round == 200) {
            CHECK_EQ(do_close(&d.q), 0);
            disk_reopen(&d, 0);
        }
    }
    uint8_t *all = malloc(SIZE);
    CHECK(all);
    CHECK_EQ(do_read(&d.q, all, SIZE, 0), 0);
    CHECK(!memcmp(all, copy, SIZE));
    free(all);
    free(copy);
    disk_end(&d);
}

/* What was never written is the base, then zeroes. */
static void untouched(enum mode mode)
{
    struct disk d;
    disk_start(&d, mode, SIZE, BASE);
    check_base(&d.q, BASE, 0);
    check_bytes(&d.q, 0, SIZE - BASE, BASE);
    disk_end(&d);
    disk_start(&d, mode, SIZE, 0);
    check_bytes(&d.q, 0, SIZE, 0);
    disk_end(&d);
}

int main(void)
{
    static const uint32_t aligns[] = { 1, 512, 4096 };
    for (enum mode mode = 0; mode < MODES; mode++) {
        untouched(mode);
        for (int i = 0; i < 3; i++) {
            random_operations(mode, aligns[i], 1 + (uint64_t)i + mode * 3);
        }
    }
    return 0;
}
