/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What the C tests share: checks, and a host whose files are memory. */
#ifndef TEST_UTIL_H
#define TEST_UTIL_H

#include <errno.h>
#include <fvd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIB ((uint64_t)1 << 10)
#define MIB ((uint64_t)1 << 20)

/* A failed check ends the program. */
#define CHECK(cond)                                                                       \
    do {                                                                                  \
        if (!(cond)) {                                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                    \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#define CHECK_EQ(a, b)                                                                    \
    do {                                                                                  \
        long long a_ = (long long)(a), b_ = (long long)(b);                               \
        if (a_ != b_) {                                                                   \
            fprintf(stderr, "%s:%d: %s is %lld, not %s = %lld\n", __FILE__, __LINE__, #a, \
                    a_, #b, b_);                                                          \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

/* When the host completes its operations. */
enum mode { INLINE, QUEUED, REVERSED, MODES };
extern const char *const mode_names[MODES];

enum op_kind { READ, WRITE, FLUSH, WRITE_ZEROES, DISCARD, TRUNCATE, GET_LENGTH, BASE_STATUS, OP_KINDS };

/* An operation that the host has not completed yet. */
struct op {
    uint64_t token;
    enum op_kind kind;
    uint32_t file;
    uint64_t offset;
    uint64_t len;
    uint32_t flags;
    const struct iovec *iov;
    int iovcnt;
    struct op *next;
};

/* A file in memory, with a volatile cache: a crash leaves what was flushed. */
struct mem_file {
    bool there;
    uint8_t *data;
    uint64_t len;
    uint8_t *durable;
    uint64_t durable_len;
};

/* The files, and what the host does with operations. Shared by its queues. */
struct mem_host {
    pthread_mutex_t lock;
    struct mem_file files[3];
    enum mode mode;
    struct fvd_limits limits;
    /* Operations of this kind on this file fail with this errno; 0: none. */
    enum op_kind fail_kind;
    uint32_t fail_file;
    int fail_errno;
    /* So many of them succeed first. */
    unsigned fail_after;
    /* Counts since the last reset. */
    unsigned ops[OP_KINDS];
    unsigned fua_writes;
    uint64_t bytes_written;
    struct fvd_host_ops callbacks;
};

/* A queue on the host: the first argument of the callbacks. */
struct mem_queue {
    struct mem_host *host;
    struct fvd_queue *queue;
    struct op *first, **last;
    bool woken;
    pthread_mutex_t wake_lock;
    pthread_cond_t wake_cond;
    uint64_t now;
    uint64_t timer_at;
    unsigned timer_sets;
    unsigned logs;
    bool freed;
    unsigned woken_after_free;
};

/* Result of a request. */
struct result {
    int calls;
    int64_t ret;
    char error[256];
    /* Requests that finished before this one did. */
    unsigned order;
    void (*then)(struct result *);
    void *opaque;
};

void mem_host_init(struct mem_host *host, enum mode mode);
void mem_host_free(struct mem_host *host);
/* Gives the host a base of len bytes; byte i is base_byte(i). */
void mem_host_base(struct mem_host *host, uint64_t len);
uint8_t base_byte(uint64_t at);
/* Makes the image file a device: len bytes of old data, and no growing. */
void mem_host_device(struct mem_host *host, uint64_t len);
/* What a power failure leaves: only what was made durable. */
void mem_host_crash(struct mem_host *host);
void mem_host_reset_counts(struct mem_host *host);
unsigned mem_host_ops(const struct mem_host *host);

/* fvd_image_new over the host; flags FVD_OPEN_*. */
struct fvd_image *image_new(struct mem_host *host, uint32_t flags);
void queue_init(struct mem_queue *q, struct mem_host *host, struct fvd_image *image);
void queue_free(struct mem_queue *q);

/* Completes what the host was given, and runs the queue, until nothing is left to do. */
void run(struct mem_queue *q);
/* Completes at most one operation; false: there was none. */
bool run_one(struct mem_queue *q);
/* Does an operation on the files and returns its result, without completing it. */
int64_t do_op(struct mem_host *host, const struct op *op);

extern unsigned requests_done;
void done(void *opaque, int64_t ret, const char *error);
/* Runs the queue until the request is done; its result. */
int64_t wait_for(struct mem_queue *q, struct result *r);

/* Blocking requests: 0 or a negative errno. */
int64_t do_create(struct mem_queue *q, uint64_t size, const char *base_name);
int64_t do_open(struct mem_queue *q);
int64_t do_close(struct mem_queue *q);
int64_t do_read(struct mem_queue *q, void *buf, size_t len, uint64_t offset);
int64_t do_write(struct mem_queue *q, const void *buf, size_t len, uint64_t offset, uint32_t flags);
int64_t do_fill(struct mem_queue *q, uint8_t byte, size_t len, uint64_t offset);
int64_t do_flush(struct mem_queue *q);
int64_t do_write_zeroes(struct mem_queue *q, uint64_t offset, uint64_t len, uint32_t flags);
int64_t do_discard(struct mem_queue *q, uint64_t offset, uint64_t len);
int64_t do_resize(struct mem_queue *q, uint64_t size, uint32_t flags);
int64_t do_status(struct mem_queue *q, uint64_t offset, uint64_t len, struct fvd_block_status *out);
int64_t do_amend(struct mem_queue *q, const struct fvd_amend *params);
int64_t do_change_base(struct mem_queue *q, const char *name, const char *format);
int64_t do_make_empty(struct mem_queue *q);
int64_t do_check(struct mem_queue *q, struct fvd_check *out);

/* Reads and compares: every byte is `byte`, or the base's. */
void check_bytes(struct mem_queue *q, uint8_t byte, size_t len, uint64_t offset);
void check_base(struct mem_queue *q, size_t len, uint64_t offset);

/* An image of size bytes, made and open: the usual start of a test. */
struct disk {
    struct mem_host host;
    struct fvd_image *image;
    struct mem_queue q;
};
void disk_start(struct disk *d, enum mode mode, uint64_t size, uint64_t base_len);
/* Closes if still open, frees everything. */
void disk_end(struct disk *d);
/* Without closing: power failure; then opens again. */
void disk_crash_and_reopen(struct disk *d);
void disk_reopen(struct disk *d, uint32_t flags);

/* A file name in the directory for temporary files; the test removes it. */
const char *temp_name(const char *name);

#endif
