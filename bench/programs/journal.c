/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Makes IMAGE over BASE with a journal of JOURNAL MiB, then first-writes COUNT
 * 4 KiB blocks, DEPTH in flight, a flush after each EVERY writes and a read
 * for each four writes. Prints time, latencies and the engine's counters.
 *
 *   journal IMAGE BASE JOURNAL COUNT DEPTH EVERY
 */
#define _GNU_SOURCE
#include <fvd.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

#define BLOCK 4096
/* Odd, so that it visits every block of a power of two of them. */
#define STRIDE 40503

enum kind { READ, WRITE, FLUSH, KINDS };

struct slot {
    enum kind kind;
    double start;
    struct iovec iov;
};

static struct fvd_file *file;
static struct fvd_queue *queue;
static uint64_t blocks, count, every, issued, written, reads_due, read_at;
static unsigned in_flight;
static double slowest[KINDS];
static uint64_t requests[KINDS];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void done(void *opaque, int64_t ret, const char *error);

static void start(struct slot *slot, enum kind kind)
{
    slot->kind = kind;
    slot->start = now();
    in_flight++;
    requests[kind]++;
    switch (kind) {
    case READ:
        read_at = (read_at + 12345) % blocks;
        fvd_submit_read(queue, read_at * BLOCK, &slot->iov, 1, 0, done, slot);
        break;
    case WRITE:
        fvd_submit_write(queue, issued++ * STRIDE % blocks * BLOCK, &slot->iov, 1, 0, done, slot);
        break;
    default:
        fvd_submit_flush(queue, done, slot);
    }
}

/* The slot's next request, unless all is written. */
static void next(struct slot *slot)
{
    if (reads_due > 0) {
        reads_due--;
        start(slot, READ);
    } else if (issued < count) {
        start(slot, WRITE);
    }
}

static void done(void *opaque, int64_t ret, const char *error)
{
    struct slot *slot = opaque;
    double took = now() - slot->start;

    if (ret < 0) {
        fail("request", error ? error : strerror((int)-ret));
    }
    if (took > slowest[slot->kind]) {
        slowest[slot->kind] = took;
    }
    in_flight--;
    if (slot->kind == WRITE) {
        written++;
        reads_due += written % 4 == 0;
        if (written % every == 0) {
            start(slot, FLUSH);
            return;
        }
    }
    next(slot);
}

int main(int argc, char **argv)
{
    struct fvd_file_options options = {
        .struct_size = sizeof(options),
        .flags = FVD_FILE_ALLOW_BASE | FVD_FILE_DIRECT,
    };
    struct fvd_create params = {
        .struct_size = sizeof(params),
        .virtual_size = UINT64_MAX,
        .block_size = BLOCK,
        .base_format = "raw",
    };
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct rusage before, after;

    if (argc != 7) {
        fprintf(stderr, "usage: journal IMAGE BASE JOURNAL COUNT DEPTH EVERY\n");
        return 2;
    }
    params.base_name = argv[2];
    params.journal_size = strtoull(argv[3], NULL, 0) << 20;
    count = strtoull(argv[4], NULL, 0);
    unsigned depth = (unsigned)strtoul(argv[5], NULL, 0);
    every = strtoull(argv[6], NULL, 0);

    if (fvd_file_create(argv[1], &params, &options) < 0) {
        fail("create", fvd_error());
    }
    if (fvd_file_open(argv[1], &options, &file) < 0) {
        fail("open", fvd_error());
    }
    queue = fvd_file_queue(file);
    if (fvd_image_info(fvd_file_image(file), &info) < 0) {
        fail("info", fvd_error());
    }
    blocks = info.virtual_size / BLOCK;
    if (count > blocks || (blocks & (blocks - 1)) != 0) {
        fail("count", "more than there are blocks, or these are no power of two");
    }

    struct slot *slots = calloc(depth, sizeof(*slots));
    char *memory;
    if (!slots || posix_memalign((void **)&memory, BLOCK, (size_t)depth * BLOCK) != 0) {
        fail("memory", "none");
    }
    memset(memory, 0x5a, (size_t)depth * BLOCK);

    getrusage(RUSAGE_SELF, &before);
    double begin = now();
    for (unsigned i = 0; i < depth; i++) {
        slots[i].iov = (struct iovec) { memory + (size_t)i * BLOCK, BLOCK };
        next(&slots[i]);
    }
    while (in_flight > 0) {
        if (fvd_file_process(file, -1) < 0) {
            fail("process", fvd_error());
        }
    }
    double seconds = now() - begin;
    getrusage(RUSAGE_SELF, &after);

    if (written != count) {
        fail("count", "not all was written");
    }
    if (fvd_image_info(fvd_file_image(file), &info) < 0) {
        fail("info", fvd_error());
    }
#define CPU(u) (u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6)
    printf("{\"seconds\": %.6f, \"cpu\": %.6f, \"writes\": %" PRIu64 ", \"reads\": %" PRIu64
           ", \"flushes\": %" PRIu64 ", \"slowest_write_ms\": %.3f, \"slowest_read_ms\": %.3f"
           ", \"slowest_flush_ms\": %.3f, \"journal_size\": %" PRIu64 ", \"journal_bytes\": %" PRIu64
           ", \"commits\": %" PRIu64 ", \"checkpoints\": %" PRIu64 ", \"pages_written\": %" PRIu64
           ", \"header_updates\": %" PRIu64 ", \"write_waits\": %" PRIu64 ", \"flush_waits\": %" PRIu64 "}\n",
           seconds, CPU(after) - CPU(before), requests[WRITE], requests[READ], requests[FLUSH],
           slowest[WRITE] * 1000, slowest[READ] * 1000, slowest[FLUSH] * 1000, info.journal_size,
           info.stat_journal_bytes, info.stat_commits, info.stat_checkpoints, info.stat_pages_written,
           info.stat_header_updates, info.stat_write_waits, info.stat_flush_waits);
    if (fvd_file_close(&file) < 0) {
        fail("close", fvd_error());
    }
    return 0;
}
