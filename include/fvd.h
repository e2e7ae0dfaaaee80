/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libfvd: FVD virtual-disk images. The contract (ownership, threads, order,
 * lifetimes) is docs/c-api.md.
 *
 * Functions that return int return 0 or a positive answer, or a negative
 * errno; fvd_error() then has the text. Functions named fvd_submit_* return
 * nothing: every failure, even of an argument, arrives at the done callback.
 */
#ifndef FVD_H
#define FVD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Files of an image. */
#define FVD_FILE_IMAGE 0
#define FVD_FILE_DATA 1
#define FVD_FILE_BASE 2

/* fvd_config.flags, fvd_file_options.flags */
#define FVD_OPEN_RDONLY 1
#define FVD_OPEN_NO_IO 2
#define FVD_FILE_DIRECT 16
#define FVD_FILE_NO_LOCK 32
#define FVD_FILE_ALLOW_BASE 64

/* Flags of requests and of the host's write and write_zeroes. */
#define FVD_REQ_FUA 1
#define FVD_REQ_MAY_UNMAP 2
#define FVD_REQ_ZEROED 4

/* fvd_limits.flags */
#define FVD_LIMIT_GROWS_ZEROED 1
#define FVD_LIMIT_CHEAP_ZEROING 2
#define FVD_LIMIT_CAN_FUA 4

#define FVD_LOG_ERROR 0
#define FVD_LOG_WARNING 1
#define FVD_LOG_INFO 2

/* Added to the result of base_status when the bytes may be data. */
#define FVD_STATUS_DATA 4611686018427387904

#define FVD_PREALLOC_OFF 0
#define FVD_PREALLOC_METADATA 1
#define FVD_PREALLOC_FALLOC 2
#define FVD_PREALLOC_FULL 3

/* fvd_block_status.place */
#define FVD_PLACE_DATA 0
#define FVD_PLACE_ZERO 1
#define FVD_PLACE_BASE 2

/* Answers and flags of fvd_lookup. */
#define FVD_LOOKUP_ASK 0
#define FVD_LOOKUP_DATA 1
#define FVD_LOOKUP_WRITE 1

/* fvd_info.flags */
#define FVD_INFO_CLEAN 1
#define FVD_INFO_HAS_BASE_LENGTH 2
#define FVD_INFO_NON_ZEROING 4
#define FVD_INFO_POISONED 8

struct fvd_image;
struct fvd_queue;
struct fvd_file;

/* What a file can do. All zero: requests of any alignment, no flags. */
struct fvd_limits {
    uint32_t struct_size;       /* sizeof(struct fvd_limits), or 0: all defaults */
    uint32_t request_alignment; /* offsets and lengths: power of two 1..4096; 0 = 1 */
    uint32_t memory_alignment;  /* addresses: power of two 1..4096; 0 = 1 */
    uint32_t write_granule;     /* writes tear at multiples of it: power of two <= 64 KiB; 0 = 4096 */
    uint32_t flags;             /* FVD_LIMIT_* */
    uint32_t reserved;          /* 0 */
};

/*
 * What the library asks of its host. read ... base_status start an operation
 * on the queue's thread; the host completes each exactly once with
 * fvd_complete(queue, token, ret) on that thread, at once if it likes. ret is
 * >= 0 or -errno. iov stays valid until the operation completes. file is
 * FVD_FILE_*. The base (FVD_FILE_BASE) is only ever read.
 */
struct fvd_host_ops {
    size_t struct_size;
    /* Fill iov from the file; past its end with zeroes. Base missing: -ENOMEDIUM. */
    void (*read)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t offset,
                 const struct iovec *iov, int iovcnt, uint64_t len);
    /* flags: FVD_REQ_FUA, only where the limits allow it. */
    void (*write)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t offset,
                  const struct iovec *iov, int iovcnt, uint64_t len, uint32_t flags);
    /* Make every completed operation durable, the file's length included. */
    void (*flush)(void *queue_opaque, uint64_t token, uint32_t file);
    /* flags: FVD_REQ_MAY_UNMAP. Optional: NULL, and zero buffers are written. */
    void (*write_zeroes)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t offset,
                         uint64_t len, uint32_t flags);
    /* Optional: NULL, and nothing is discarded. */
    void (*discard)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t offset, uint64_t len);
    /* Set the file's length. Optional: NULL is -ENOTSUP. */
    void (*truncate)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t length);
    /* ret: the file's length in bytes. Base missing: -ENOMEDIUM. */
    void (*get_length)(void *queue_opaque, uint64_t token, uint32_t file);
    /*
     * ret: how many bytes from offset on (1..len) are alike: known to read as
     * zero or, with FVD_STATUS_DATA added, possibly data. Optional: NULL is
     * all data.
     */
    void (*base_status)(void *queue_opaque, uint64_t token, uint64_t offset, uint64_t len);
    /*
     * From any thread: have fvd_queue_run called soon on the queue's thread.
     * Must not call the library. Never called once fvd_queue_free returned.
     */
    void (*wake)(void *queue_opaque);
    /* Monotonic clock. Optional: NULL is CLOCK_MONOTONIC. */
    uint64_t (*now_ns)(void *queue_opaque);
    /* 0 or -errno. Optional: NULL is getrandom(2). */
    int (*random_bytes)(void *queue_opaque, void *buf, size_t len);
    /*
     * Call fvd_queue_timer once at or after at_ns (now_ns's clock); replaces
     * the earlier time; UINT64_MAX cancels. Optional: NULL, and metadata is
     * committed by flushes only.
     */
    void (*set_timer)(void *queue_opaque, uint64_t at_ns);
    /* level: FVD_LOG_*; text is valid during the call. Optional. */
    void (*log)(void *queue_opaque, uint32_t level, const char *text);
};

struct fvd_config {
    size_t struct_size;
    uint32_t flags;              /* FVD_OPEN_RDONLY, FVD_OPEN_NO_IO */
    uint32_t reserved;           /* 0 */
    struct fvd_limits limits[3]; /* by FVD_FILE_* */
    uint64_t commit_interval_ms; /* longest time without a commit; 0 = 5000 */
    uint64_t metadata_memory;    /* bytes at most; 0 = 1 GiB */
};

struct fvd_create {
    size_t struct_size;
    uint64_t virtual_size;       /* bytes, a multiple of 512; UINT64_MAX: the base's length */
    uint32_t block_size;         /* copy-on-write unit; 0: chosen */
    uint32_t preallocation;      /* FVD_PREALLOC_* */
    uint64_t journal_size;       /* bytes; 0 = 16 MiB */
    uint64_t detect_sparse_hole; /* look for zero runs this long in the base; 0: do not; 1: one block */
    const char *base_name;       /* UTF-8; NULL: no base */
    const char *base_format;     /* mandatory with base_name */
};

/* Where the first len bytes of a range are, all alike. */
struct fvd_block_status {
    size_t struct_size;
    uint32_t place;  /* FVD_PLACE_* */
    uint32_t file;   /* FVD_PLACE_DATA: FVD_FILE_* */
    uint64_t offset; /* FVD_PLACE_DATA: in that file */
    uint64_t len;    /* > 0 */
};

struct fvd_check {
    size_t struct_size;
    uint64_t corruptions;
    uint64_t leaked; /* bytes that nothing uses */
    uint64_t blocks_total;
    uint64_t blocks_present;
    uint64_t image_end; /* one past the last byte in use */
};

/* Answer of fvd_lookup. */
struct fvd_mapping {
    uint32_t file;   /* FVD_FILE_IMAGE or FVD_FILE_DATA */
    uint32_t token;  /* for fvd_end */
    uint64_t offset; /* in that file */
    uint64_t len;    /* 1..asked */
};

struct fvd_info {
    size_t struct_size;
    uint8_t uuid[16];
    uint32_t version;
    uint32_t block_size; /* 0: no bitmap */
    uint32_t chunk_size; /* 0: not compact */
    uint32_t flags;      /* FVD_INFO_* */
    uint64_t virtual_size;
    uint64_t generation;
    uint64_t epoch;
    uint64_t base_length; /* with FVD_INFO_HAS_BASE_LENGTH */
    uint64_t covered;     /* guest bytes the bitmap covers */
    uint64_t data_offset;
    uint64_t journal_size;
    uint64_t metadata_bytes;
    uint64_t blocks;
    uint64_t commits_replayed;
    uint64_t incompatible;
    uint64_t compatible;
    uint64_t autoclear;
    uint64_t stat_commits;
    uint64_t stat_journal_bytes;
    uint64_t stat_checkpoints;
    uint64_t stat_pages_written;
    uint64_t stat_header_updates;
    uint64_t stat_write_waits;
    uint64_t stat_flush_waits;
    uint64_t stat_base_bytes;
    char base_name[1024];
    char base_format[32];
};

struct fvd_file_options {
    size_t struct_size;
    uint32_t flags; /* FVD_OPEN_*, FVD_FILE_DIRECT, FVD_FILE_NO_LOCK, FVD_FILE_ALLOW_BASE */
    uint32_t depth; /* operations in flight; 0: chosen */
    uint64_t commit_interval_ms;
    uint64_t metadata_memory;
};

/* ret: 0 or -errno. error: NULL on success, else a text valid during the call. */
typedef void fvd_done_fn(void *opaque, int64_t ret, const char *error);
/* One finding of a check; text is valid during the call. */
typedef void fvd_finding_fn(void *opaque, const char *text);

#ifdef __cplusplus
extern "C" {
#endif

/* (major << 16) | (minor << 8) | patch */
uint32_t fvd_version(void);
const char *fvd_version_string(void);
/* Text of the last failed call on this thread; valid until its next call. Never NULL. */
const char *fvd_error(void);
/* 2: FVD version 2; 1: version 1; 0: something else. 64 bytes are enough. */
int fvd_probe(const void *buf, size_t len);

/* Both structs are copied. */
int fvd_image_new(const struct fvd_host_ops *ops, const struct fvd_config *config,
                  struct fvd_image **out);
/* All queues were freed before (otherwise nothing happens). Sets *image to NULL. */
void fvd_image_free(struct fvd_image **image);
/* From any thread, while the image is open. */
int fvd_image_info(struct fvd_image *image, struct fvd_info *out);

/* On the thread that will own the queue. */
int fvd_queue_new(struct fvd_image *image, void *queue_opaque, struct fvd_queue **out);
/* -EBUSY unless idle. Sets *queue to NULL. */
int fvd_queue_free(struct fvd_queue **queue);
/* 1: no request and no operation under way. */
int fvd_queue_is_idle(const struct fvd_queue *queue);
void fvd_queue_run(struct fvd_queue *queue);
void fvd_queue_timer(struct fvd_queue *queue);
void fvd_complete(struct fvd_queue *queue, uint64_t token, int64_t ret);

/* done is called exactly once, on the queue's thread, maybe before submit returns. */
void fvd_submit_create(struct fvd_queue *queue, const struct fvd_create *params,
                       fvd_done_fn *done, void *opaque);
void fvd_submit_open(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);
void fvd_submit_close(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);
/* iov and the memory stay valid until done. flags: 0. */
void fvd_submit_read(struct fvd_queue *queue, uint64_t offset, const struct iovec *iov,
                     int iovcnt, uint32_t flags, fvd_done_fn *done, void *opaque);
/* flags: FVD_REQ_FUA. */
void fvd_submit_write(struct fvd_queue *queue, uint64_t offset, const struct iovec *iov,
                      int iovcnt, uint32_t flags, fvd_done_fn *done, void *opaque);
void fvd_submit_flush(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);
/* flags: FVD_REQ_FUA, FVD_REQ_MAY_UNMAP. */
void fvd_submit_write_zeroes(struct fvd_queue *queue, uint64_t offset, uint64_t len,
                             uint32_t flags, fvd_done_fn *done, void *opaque);
void fvd_submit_discard(struct fvd_queue *queue, uint64_t offset, uint64_t len,
                        fvd_done_fn *done, void *opaque);
/* flags: FVD_REQ_ZEROED: fail unless the new space reads as zero. */
void fvd_submit_resize(struct fvd_queue *queue, uint64_t size, uint32_t flags,
                       fvd_done_fn *done, void *opaque);
/* out stays valid until done. */
void fvd_submit_block_status(struct fvd_queue *queue, uint64_t offset, uint64_t len,
                             struct fvd_block_status *out, fvd_done_fn *done, void *opaque);
/* Names are copied; name NULL or empty: no base. */
void fvd_submit_change_base(struct fvd_queue *queue, const char *name, const char *format,
                            fvd_done_fn *done, void *opaque);
/* finding (may be NULL) is called for each finding, just before done. */
void fvd_submit_check(struct fvd_queue *queue, struct fvd_check *out, fvd_finding_fn *finding,
                      fvd_done_fn *done, void *opaque);

/*
 * Where to do pass-through I/O. FVD_LOOKUP_DATA: do it there, then call
 * fvd_end(image, out->token) once. FVD_LOOKUP_ASK: submit a request instead
 * (out is untouched, no fvd_end). From any thread; slot: a small number, best one for
 * each thread. Anything wrong with the arguments is FVD_LOOKUP_ASK too.
 */
int fvd_lookup(struct fvd_image *image, uint32_t slot, uint64_t offset, uint64_t len,
               uint32_t flags, struct fvd_mapping *out);
/* From any thread. */
void fvd_end(struct fvd_image *image, uint32_t token);

/* Ready-made host for files and block devices: one thread, one queue. */
int fvd_file_create(const char *path, const struct fvd_create *params,
                    const struct fvd_file_options *options);
int fvd_file_open(const char *path, const struct fvd_file_options *options, struct fvd_file **out);
struct fvd_queue *fvd_file_queue(struct fvd_file *file);
struct fvd_image *fvd_file_image(struct fvd_file *file);
/* Readable when fvd_file_process has work. */
int fvd_file_fd(struct fvd_file *file);
/* Runs completions; their number or -errno. timeout_ms: 0 polls, -1 waits. */
int fvd_file_process(struct fvd_file *file, int timeout_ms);
int64_t fvd_file_pread(struct fvd_file *file, void *buf, size_t len, uint64_t offset);
int64_t fvd_file_pwrite(struct fvd_file *file, const void *buf, size_t len, uint64_t offset);
int fvd_file_flush(struct fvd_file *file);
/* Closes cleanly. The handle is freed, and *file set to NULL, in any case. */
int fvd_file_close(struct fvd_file **file);

#ifdef __cplusplus
}
#endif

#endif /* FVD_H */
