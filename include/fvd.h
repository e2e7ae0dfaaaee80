/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libfvd: FVD virtual-disk images. Made by cbindgen from rust/fvd-capi, do not
 * edit. The contract (ownership, threads, order, lifetimes) is docs/c-api.md.
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

/**
 * Called once when a request is done, on the queue's thread.
 *
 * ret is 0 or a negative errno. error is NULL on success, else a text that
 * is valid during the call.
 */
typedef void fvd_done_fn(void *opaque, int64_t ret, const char *error);

/**
 * Called for one finding of a check; text is valid during the call.
 */
typedef void fvd_finding_fn(void *opaque, const char *text);


/**
 * The image file: metadata, and guest data unless a data file holds it.
 */
#define FVD_FILE_IMAGE 0

/**
 * The data file, where there is one.
 */
#define FVD_FILE_DATA 1

/**
 * The base, as the guest sees it. Only ever read.
 */
#define FVD_FILE_BASE 2

/**
 * Writes, and whatever would write, are refused.
 */
#define FVD_OPEN_RDONLY 1

/**
 * Only the header is read, and only fvd_image_info answers.
 */
#define FVD_OPEN_NO_IO 2

/**
 * Discarded chunks of a compact image keep their place: what is discarded is
 * punched or zeroed there, so that the disk stays in order in its file.
 */
#define FVD_OPEN_DISCARD_NO_UNREF 4

/**
 * Writes that find no storage, where it does not grow by itself, wait for
 * fvd_image_space_changed instead of failing with -ENOSPC.
 */
#define FVD_OPEN_WAIT_FOR_SPACE 8

/**
 * fvd_file_options: past the page cache (O_DIRECT).
 */
#define FVD_FILE_DIRECT 16

/**
 * fvd_file_options: take no locks.
 */
#define FVD_FILE_NO_LOCK 32

/**
 * fvd_file_options: open the base that the header names.
 */
#define FVD_FILE_ALLOW_BASE 64

/**
 * fvd_file_options: open the data file that the header names.
 */
#define FVD_FILE_ALLOW_DATA 128

/**
 * The data file may be missing or too short: fvd_image_info, block status and
 * a check without repair answer, everything else fails. Read-only.
 */
#define FVD_OPEN_METADATA 256

/**
 * Durable on completion.
 */
#define FVD_REQ_FUA 1

/**
 * The storage may be given back.
 */
#define FVD_REQ_MAY_UNMAP 2

/**
 * Resize: fail unless the new space reads as zero.
 */
#define FVD_REQ_ZEROED 4

/**
 * Zeroing asked of the host: answer -ENOTSUP where it would take writing
 * zeroes.
 */
#define FVD_REQ_NO_FALLBACK 8

/**
 * The file grows by truncate, and the new space reads as zero.
 */
#define FVD_LIMIT_GROWS_ZEROED 1

/**
 * Zeroing a range costs no data transfer.
 */
#define FVD_LIMIT_CHEAP_ZEROING 2

/**
 * Writes may carry FVD_REQ_FUA.
 */
#define FVD_LIMIT_CAN_FUA 4

/**
 * Something failed.
 */
#define FVD_LOG_ERROR 0

/**
 * Something is odd but handled.
 */
#define FVD_LOG_WARNING 1

/**
 * Worth knowing.
 */
#define FVD_LOG_INFO 2

/**
 * Added to the result of base_status when the bytes may be data.
 */
#define FVD_STATUS_DATA 4611686018427387904

/**
 * Nothing but the length.
 */
#define FVD_PREALLOC_OFF 0

/**
 * Compact: every chunk has its place. Otherwise as FVD_PREALLOC_OFF.
 */
#define FVD_PREALLOC_METADATA 1

/**
 * Space for the whole disk, without a data transfer where the host can.
 */
#define FVD_PREALLOC_FALLOC 2

/**
 * Zeroes written to the whole disk.
 */
#define FVD_PREALLOC_FULL 3

/**
 * fvd_submit_check: space that nothing uses is given back.
 */
#define FVD_CHECK_REPAIR_LEAKS 1

/**
 * fvd_submit_check: leaks, and all damage that can be repaired.
 */
#define FVD_CHECK_REPAIR_ALL 2

/**
 * fvd_create: storage is allocated a chunk at a time, by a lookup table.
 */
#define FVD_CREATE_COMPACT 1

/**
 * fvd_amend: storage_grow_unit is given.
 */
#define FVD_AMEND_STORAGE_GROW_UNIT 1

/**
 * fvd_amend: flags are given.
 */
#define FVD_AMEND_FLAGS 2

/**
 * fvd_amend: chunk_size is given.
 */
#define FVD_AMEND_CHUNK_SIZE 4

/**
 * fvd_amend: block_size is given.
 */
#define FVD_AMEND_BLOCK_SIZE 8

/**
 * fvd_amend: journal_size is given.
 */
#define FVD_AMEND_JOURNAL_SIZE 16

/**
 * In a file of this image.
 */
#define FVD_PLACE_DATA 0

/**
 * Reads as zero.
 */
#define FVD_PLACE_ZERO 1

/**
 * In the base, at the same offset.
 */
#define FVD_PLACE_BASE 2

/**
 * Answer of fvd_lookup: submit a request instead.
 */
#define FVD_LOOKUP_ASK 0

/**
 * Answer of fvd_lookup: do the I/O there, then call fvd_end.
 */
#define FVD_LOOKUP_DATA 1

/**
 * Flag of fvd_lookup: for a write.
 */
#define FVD_LOOKUP_WRITE 1

/**
 * The image was marked clean when it was opened.
 */
#define FVD_INFO_CLEAN 1

/**
 * base_length is known.
 */
#define FVD_INFO_HAS_BASE_LENGTH 2

/**
 * Space past the base is not known to read as zero.
 */
#define FVD_INFO_NON_ZEROING 4

/**
 * An earlier failure made the image unusable; open it anew.
 */
#define FVD_INFO_POISONED 8

/**
 * An image opened by path. Used by the thread that opened it.
 */
struct fvd_file;

/**
 * An image: may be used from any thread.
 */
struct fvd_image;

/**
 * A thread's way into an image. Used by one thread at a time.
 */
struct fvd_queue;

/**
 * Parameters of a new image.
 */
struct fvd_create {
    /**
     * sizeof(struct fvd_create)
     */
    size_t struct_size;
    /**
     * Bytes, a multiple of 512; UINT64_MAX: the base's length.
     */
    uint64_t virtual_size;
    /**
     * Copy-on-write unit in bytes: a power of two, 4 KiB to 2 MiB; 0: chosen
     * by the base's length.
     */
    uint32_t block_size;
    /**
     * FVD_PREALLOC_*
     */
    uint32_t preallocation;
    /**
     * Bytes: 1 to 256 MiB, a multiple of 64 KiB; 0: 16 MiB.
     */
    uint64_t journal_size;
    /**
     * Look for runs of zeroes at least this long in the base, and do not read
     * them from there later; 0: do not look; 1: one block.
     */
    uint64_t detect_sparse_hole;
    /**
     * Path of the base as it will stand in the image, UTF-8; NULL or empty:
     * no base.
     */
    const char *base_name;
    /**
     * Format of the base; mandatory with base_name.
     */
    const char *base_format;
    /**
     * FVD_CREATE_*
     */
    uint32_t flags;
    /**
     * Compact: allocation unit in bytes, a power of two, 64 KiB to 64 MiB;
     * 0: 1 MiB, or more where a block is larger or the disk would have more
     * than 2^31 chunks.
     */
    uint32_t chunk_size;
    /**
     * Compact: the file grows in steps of so many bytes, a multiple of the
     * chunk size; 0: 64 MiB, of larger disks in files up to 256 MiB.
     */
    uint64_t storage_grow_unit;
    /**
     * Path of the data file as it will stand in the image, UTF-8; NULL or
     * empty: guest data lies in the image file. What FVD_FILE_DATA holds is
     * lost.
     */
    const char *data_name;
    /**
     * Format of the data file: "raw"; mandatory with data_name.
     */
    const char *data_format;
};

/**
 * How the ready-made file host opens an image.
 */
struct fvd_file_options {
    /**
     * sizeof(struct fvd_file_options)
     */
    size_t struct_size;
    /**
     * FVD_OPEN_*, FVD_FILE_DIRECT, FVD_FILE_NO_LOCK, FVD_FILE_ALLOW_BASE,
     * FVD_FILE_ALLOW_DATA
     */
    uint32_t flags;
    /**
     * Longest chain of bases; 0: 64.
     */
    uint32_t depth;
    /**
     * As in fvd_config.
     */
    uint64_t commit_interval_ms;
    /**
     * As in fvd_config.
     */
    uint64_t metadata_memory;
    /**
     * As in fvd_host_ops; of use where the image lies on a block device.
     * NULL: nobody is asked.
     */
    void (*low_space)(void *opaque, uint64_t free, uint64_t wanted);
    /**
     * What low_space is called with.
     */
    void *opaque;
};

/**
 * What the library asks of its host.
 *
 * read to base_status start an operation. They are called on the queue's
 * thread; the host completes each operation exactly once, by
 * fvd_complete(queue, token, ret) on that thread, at once or later. ret is a
 * negative errno on failure, otherwise 0 or more. iov, and the memory it
 * names, stay valid until the operation completes. file is FVD_FILE_*.
 *
 * read, write, flush, get_length and wake are required; each other member
 * may be NULL, with the fallback stated here.
 */
struct fvd_host_ops {
    /**
     * sizeof(struct fvd_host_ops)
     */
    size_t struct_size;
    /**
     * Fill iov from the file; past the file's end with zeroes. From the base
     * where there is none: -ENOMEDIUM.
     */
    void (*read)(void *queue_opaque,
                 uint64_t token,
                 uint32_t file,
                 uint64_t offset,
                 const struct iovec *iov,
                 int iovcnt,
                 uint64_t len);
    /**
     * Write iov to the file. flags: FVD_REQ_FUA, only where the limits allow
     * it.
     */
    void (*write)(void *queue_opaque,
                  uint64_t token,
                  uint32_t file,
                  uint64_t offset,
                  const struct iovec *iov,
                  int iovcnt,
                  uint64_t len,
                  uint32_t flags);
    /**
     * Make every operation that completed durable, the file's length
     * included.
     */
    void (*flush)(void *queue_opaque, uint64_t token, uint32_t file);
    /**
     * Make the range read as zero. flags: FVD_REQ_MAY_UNMAP, and
     * FVD_REQ_NO_FALLBACK where the limits say FVD_LIMIT_CHEAP_ZEROING.
     * NULL: the library writes zeroes.
     */
    void (*write_zeroes)(void *queue_opaque,
                         uint64_t token,
                         uint32_t file,
                         uint64_t offset,
                         uint64_t len,
                         uint32_t flags);
    /**
     * The range's content is not needed any more; afterwards it reads as
     * before or as zero. NULL: nothing is discarded.
     */
    void (*discard)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t offset, uint64_t len);
    /**
     * Set the file's length. NULL: the file does not grow (-ENOSPC).
     */
    void (*truncate)(void *queue_opaque, uint64_t token, uint32_t file, uint64_t length);
    /**
     * ret: the file's length in bytes. Of the base, or the data file, where
     * there is none: -ENOMEDIUM.
     */
    void (*get_length)(void *queue_opaque, uint64_t token, uint32_t file);
    /**
     * ret: how many bytes of the base from offset on (1 to len) are alike:
     * known to read as zero or, with FVD_STATUS_DATA added, possibly data.
     * NULL: all of it is data.
     */
    void (*base_status)(void *queue_opaque, uint64_t token, uint64_t offset, uint64_t len);
    /**
     * Have fvd_queue_run called soon on the queue's thread. Called from any
     * thread; must not call the library. Not called any more once
     * fvd_queue_free has returned.
     */
    void (*wake)(void *queue_opaque);
    /**
     * Nanoseconds of a monotonic clock. NULL: CLOCK_MONOTONIC.
     */
    uint64_t (*now_ns)(void *queue_opaque);
    /**
     * Fill buf with unpredictable bytes: 0, or anything else on failure.
     * NULL, or failure: getrandom(2).
     */
    int (*random_bytes)(void *queue_opaque, void *buf, size_t len);
    /**
     * Call fvd_queue_timer once at or after at_ns of now_ns's clock. Replaces
     * the time set before; UINT64_MAX: do not call it. NULL: metadata is
     * committed by flushes and by its size only.
     */
    void (*set_timer)(void *queue_opaque, uint64_t at_ns);
    /**
     * A message for people. level: FVD_LOG_*. text is valid during the call.
     * NULL: nobody reads it.
     */
    void (*log)(void *queue_opaque, uint32_t level, const char *text);
    /**
     * Storage that does not grow by itself (no FVD_LIMIT_GROWS_ZEROED) is
     * nearly used up: free bytes of it are left for guest data, and the image
     * can use wanted bytes more, at most storage_grow_unit. Called ahead of
     * need, when less than a growth step is left behind what the image uses,
     * and when a write finds nothing; once for each length of the storage,
     * and again after each fvd_image_space_changed. Make the storage longer
     * and call that function, from here or later from any thread. NULL:
     * nobody is asked.
     */
    void (*low_space)(void *queue_opaque, uint64_t free, uint64_t wanted);
};

/**
 * What a file can do. All zero, struct_size too: requests of any alignment,
 * no flags.
 */
struct fvd_limits {
    /**
     * sizeof(struct fvd_limits), or 0 if all is 0.
     */
    uint32_t struct_size;
    /**
     * Offsets and lengths of requests are multiples of it: a power of two,
     * 1 to 4096; 0 is 1.
     */
    uint32_t request_alignment;
    /**
     * Addresses of buffers are multiples of it: a power of two, 1 to 4096;
     * 0 is 1.
     */
    uint32_t memory_alignment;
    /**
     * The storage tears writes at multiples of it: a power of two up to
     * 65536; less than 4096 counts as 4096.
     */
    uint32_t write_granule;
    /**
     * FVD_LIMIT_*
     */
    uint32_t flags;
    /**
     * 0
     */
    uint32_t reserved;
};

/**
 * How an image is opened or created.
 */
struct fvd_config {
    /**
     * sizeof(struct fvd_config)
     */
    size_t struct_size;
    /**
     * FVD_OPEN_*
     */
    uint32_t flags;
    /**
     * 0
     */
    uint32_t reserved;
    /**
     * What the host's files can do, by FVD_FILE_*.
     */
    struct fvd_limits limits[3];
    /**
     * Longest time that metadata stays uncommitted without a flush;
     * 0: 5000.
     */
    uint64_t commit_interval_ms;
    /**
     * Most memory for metadata in bytes; 0: 1 GiB.
     */
    uint64_t metadata_memory;
};

/**
 * A picture of an open image.
 */
struct fvd_info {
    /**
     * sizeof(struct fvd_info), set by the caller.
     */
    size_t struct_size;
    /**
     * The image's identity.
     */
    uint8_t uuid[16];
    /**
     * Version of the format.
     */
    uint32_t version;
    /**
     * Copy-on-write unit in bytes; 0: the image has no bitmap.
     */
    uint32_t block_size;
    /**
     * Allocation unit in bytes; 0: the image is not compact.
     */
    uint32_t chunk_size;
    /**
     * FVD_INFO_*
     */
    uint32_t flags;
    /**
     * Bytes.
     */
    uint64_t virtual_size;
    /**
     * Number of header updates.
     */
    uint64_t generation;
    /**
     * Number of writing sessions.
     */
    uint64_t epoch;
    /**
     * Length of the base at creation, with FVD_INFO_HAS_BASE_LENGTH.
     */
    uint64_t base_length;
    /**
     * Guest bytes that the bitmap covers; all beyond is in this image.
     */
    uint64_t covered;
    /**
     * Where guest data starts, in the file that holds it.
     */
    uint64_t data_offset;
    /**
     * Bytes.
     */
    uint64_t journal_size;
    /**
     * Bytes of all metadata regions.
     */
    uint64_t metadata_bytes;
    /**
     * Blocks that the bitmap covers.
     */
    uint64_t blocks;
    /**
     * Commits that recovery replayed when the image was opened.
     */
    uint64_t commits_replayed;
    /**
     * Feature bits.
     */
    uint64_t incompatible;
    /**
     * Feature bits.
     */
    uint64_t compatible;
    /**
     * Feature bits.
     */
    uint64_t autoclear;
    /**
     * Since open: commits made durable.
     */
    uint64_t stat_commits;
    /**
     * Since open: journal bytes written.
     */
    uint64_t stat_journal_bytes;
    /**
     * Since open: checkpoints finished.
     */
    uint64_t stat_checkpoints;
    /**
     * Since open: metadata pages written in place.
     */
    uint64_t stat_pages_written;
    /**
     * Since open: header updates finished.
     */
    uint64_t stat_header_updates;
    /**
     * Since open: writes that had to wait for a commit or a checkpoint.
     */
    uint64_t stat_write_waits;
    /**
     * Since open: flushes that had to wait for a checkpoint.
     */
    uint64_t stat_flush_waits;
    /**
     * Since open: bytes read from the base.
     */
    uint64_t stat_base_bytes;
    /**
     * Path of the base; empty: none.
     */
    char base_name[1024];
    /**
     * Format of the base.
     */
    char base_format[32];
    /**
     * Compact: the file grows in steps of so many bytes.
     */
    uint64_t storage_grow_unit;
    /**
     * Compact: where the storage that chunks may lie in ends in the file, as
     * the header has it.
     */
    uint64_t reach;
    /**
     * Compact: chunks of the disk.
     */
    uint64_t chunks;
    /**
     * Path of the data file, which the caller opens if it likes; empty: guest
     * data lies in the image file.
     */
    char data_name[1024];
    /**
     * Format of the data file.
     */
    char data_format[32];
};

/**
 * Answer of fvd_lookup.
 */
struct fvd_mapping {
    /**
     * FVD_FILE_IMAGE or FVD_FILE_DATA
     */
    uint32_t file;
    /**
     * For fvd_end.
     */
    uint32_t token;
    /**
     * First byte in the file.
     */
    uint64_t offset;
    /**
     * 1 to the length asked for.
     */
    uint64_t len;
};

/**
 * Where the first len bytes of a range are, all alike.
 */
struct fvd_block_status {
    /**
     * sizeof(struct fvd_block_status), set by the caller.
     */
    size_t struct_size;
    /**
     * FVD_PLACE_*
     */
    uint32_t place;
    /**
     * FVD_PLACE_DATA: in which file (FVD_FILE_*)
     */
    uint32_t file;
    /**
     * FVD_PLACE_DATA: and where in it.
     */
    uint64_t offset;
    /**
     * 1 to the length asked for.
     */
    uint64_t len;
};

/**
 * What an image that exists is asked to have.
 */
struct fvd_amend {
    /**
     * sizeof(struct fvd_amend)
     */
    size_t struct_size;
    /**
     * FVD_AMEND_*: which of the members below are given.
     */
    uint32_t given;
    /**
     * FVD_CREATE_*; cannot change.
     */
    uint32_t flags;
    /**
     * Compact: steps of the file's growth in bytes, a multiple of the chunk
     * size.
     */
    uint64_t storage_grow_unit;
    /**
     * As fvd_info has it; cannot change.
     */
    uint64_t chunk_size;
    /**
     * As fvd_info has it; cannot change.
     */
    uint64_t block_size;
    /**
     * As fvd_info has it; cannot change.
     */
    uint64_t journal_size;
};

/**
 * What a check found.
 */
struct fvd_check {
    /**
     * sizeof(struct fvd_check), set by the caller.
     */
    size_t struct_size;
    /**
     * Damaged structures that are left.
     */
    uint64_t corruptions;
    /**
     * Bytes at the end of the files that nothing uses, and are left.
     */
    uint64_t leaked;
    /**
     * Blocks that the bitmap covers.
     */
    uint64_t blocks_total;
    /**
     * Of these, blocks that are in this image.
     */
    uint64_t blocks_present;
    /**
     * One past the last byte of the image file in use.
     */
    uint64_t image_end;
    /**
     * Compact: chunks of the disk.
     */
    uint64_t chunks_total;
    /**
     * Compact: of these, chunks with storage.
     */
    uint64_t chunks_allocated;
    /**
     * Compact: of these, chunks whose storage does not follow that of the
     * chunk before.
     */
    uint64_t chunks_fragmented;
    /**
     * Damaged structures that were repaired, which corruptions does not count.
     */
    uint64_t corruptions_fixed;
    /**
     * Bytes that were given back, which leaked does not count.
     */
    uint64_t leaked_fixed;
    /**
     * Guest bytes of which nobody can tell what they held: they cannot be
     * read, and read as the base or as zero after a repair.
     */
    uint64_t lost_bytes;
};

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/**
 * Text of the last failed call on this thread, "" if there was none. Never
 * NULL. Valid until the next call fails on this thread, or the thread ends.
 */
const char *fvd_error(void);

/**
 * Makes an image at path; what is there is overwritten unless it is in use.
 * The base named in params is opened with FVD_FILE_ALLOW_BASE, otherwise only
 * its name is recorded. The data file named in params, relative to path, is
 * made, or overwritten. options NULL: the defaults. Returns when done.
 */
int fvd_file_create(const char *path,
                    const struct fvd_create *params,
                    const struct fvd_file_options *options);

/**
 * Opens the image at path, with QEMU's locks unless FVD_FILE_NO_LOCK. The
 * base that the image names is opened with FVD_FILE_ALLOW_BASE only; without
 * it what is not in the image reads as zero. The data file that the image
 * names is opened with FVD_FILE_ALLOW_DATA only, by a path relative to the
 * image's; without it an image that has one does not open, unless it is opened
 * with FVD_OPEN_NO_IO or FVD_OPEN_METADATA. options NULL: the defaults.
 */
int fvd_file_open(const char *path, const struct fvd_file_options *options, struct fvd_file **out);

/**
 * The file's queue, for asynchronous requests; it lives as long as the file.
 * NULL on wrong arguments.
 */
struct fvd_queue *fvd_file_queue(struct fvd_file *file);

/**
 * The file's image, for fvd_image_info; it lives as long as the file. NULL on
 * wrong arguments.
 */
struct fvd_image *fvd_file_image(struct fvd_file *file);

/**
 * A file descriptor that is readable when fvd_file_process has something to
 * do. It belongs to the file.
 */
int fvd_file_fd(struct fvd_file *file);

/**
 * Handles what is finished: done callbacks run in here. Waits for something
 * to be finished at most timeout_ms; 0: does not wait; -1: without limit. The
 * number of finished operations, or a negative errno. -EBUSY from within a
 * callback of the file's queue.
 */
int fvd_file_process(struct fvd_file *file, int timeout_ms);

/**
 * Reads len bytes at guest byte offset. len, or a negative errno; -EBUSY from
 * within a callback of the file's queue. So do the next two.
 */
int64_t fvd_file_pread(struct fvd_file *file, void *buf, size_t len, uint64_t offset);

/**
 * Writes len bytes at guest byte offset. len, or a negative errno.
 */
int64_t fvd_file_pwrite(struct fvd_file *file, const void *buf, size_t len, uint64_t offset);

/**
 * Makes everything written durable. 0, or a negative errno.
 */
int fvd_file_flush(struct fvd_file *file);

/**
 * Closes the image as fvd_submit_close does. Its result; the file is freed
 * and *file set to NULL in any case but one: from within a callback of the
 * file's queue this is -EBUSY and nothing happens. NULL is fine.
 */
int fvd_file_close(struct fvd_file **file);

/**
 * A handle for an image; its files are what ops reaches. Both structs are
 * copied. The handle serves fvd_submit_create and fvd_submit_open.
 */
int fvd_image_new(const struct fvd_host_ops *ops,
                  const struct fvd_config *config,
                  struct fvd_image **out);

/**
 * Frees an image and sets *image to NULL. All its queues were freed before:
 * otherwise nothing happens, and fvd_error() says so. NULL is fine. An image
 * that was not closed is left as after a power failure: the next open
 * recovers it.
 */
void fvd_image_free(struct fvd_image **image);

/**
 * A picture of the image: after fvd_submit_open succeeded, from any thread.
 */
int fvd_image_info(struct fvd_image *image, struct fvd_info *out);

/**
 * The answer to low_space. result 0: the storage got longer; writes that
 * wait for storage look again, and low_space is called again if there is not
 * enough. A negative errno: it could not; those that wait fail with -ENOSPC.
 * From any thread, also from low_space.
 */
int fvd_image_space_changed(struct fvd_image *image, int result);

/**
 * Whether writes that find no storage wait: at first as
 * FVD_OPEN_WAIT_FOR_SPACE says. With wait 0 those that wait now fail with
 * -ENOSPC, too. From any thread, also from low_space.
 */
int fvd_image_wait_for_space(struct fvd_image *image, int wait);

/**
 * Where guest bytes are, if the caller may do the I/O itself.
 *
 * FVD_LOOKUP_DATA: the first out->len bytes are at out->offset of out->file.
 * Do the I/O there, then call fvd_end(image, out->token), exactly once; until
 * then the place stays theirs. FVD_LOOKUP_ASK: submit a request instead; out
 * is untouched, and there is nothing to end. Not for writes with
 * FVD_REQ_FUA. From any thread; slot is any number, best one per thread, and
 * flags FVD_LOOKUP_WRITE or 0. Wrong arguments are answered FVD_LOOKUP_ASK.
 */
int fvd_lookup(struct fvd_image *image,
               uint32_t slot,
               uint64_t offset,
               uint64_t len,
               uint32_t flags,
               struct fvd_mapping *out);

/**
 * The I/O after a lookup is done. From any thread.
 */
void fvd_end(struct fvd_image *image, uint32_t token);

/**
 * A queue of image. queue_opaque is the first argument of the callbacks.
 */
int fvd_queue_new(struct fvd_image *image, void *queue_opaque, struct fvd_queue **out);

/**
 * Frees a queue and sets *queue to NULL. -EBUSY, and nothing happens, unless
 * it is idle and no callback of it is running. NULL is fine.
 */
int fvd_queue_free(struct fvd_queue **queue);

/**
 * 1: no request and no operation is under way. 0: some is.
 */
int fvd_queue_is_idle(const struct fvd_queue *queue);

/**
 * Goes on with what other threads woke: after the host's wake was called.
 * Calling it without need is harmless.
 */
void fvd_queue_run(struct fvd_queue *queue);

/**
 * The time set by set_timer has come. Calling it without need is harmless.
 */
void fvd_queue_timer(struct fvd_queue *queue);

/**
 * The operation token is done: on the queue's thread, exactly once for each,
 * also from inside the callback that started it. ret: a negative errno on
 * failure, otherwise what the operation returns. A token that is not under
 * way changes nothing.
 */
void fvd_complete(struct fvd_queue *queue, uint64_t token, int64_t ret);

/**
 * Makes a new image in the image file, and the data file if it is to have one;
 * the handle stays unopened. params is copied.
 */
void fvd_submit_create(struct fvd_queue *queue,
                       const struct fvd_create *params,
                       fvd_done_fn *done,
                       void *opaque);

/**
 * Opens the image.
 */
void fvd_submit_open(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);

/**
 * Waits for the requests under way, writes all metadata and marks the image
 * clean. Nothing is served afterwards, whether this succeeds or not.
 */
void fvd_submit_close(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);

/**
 * Fills iov from guest byte offset on. The array and the memory stay valid
 * until done. flags: 0.
 */
void fvd_submit_read(struct fvd_queue *queue,
                     uint64_t offset,
                     const struct iovec *iov,
                     int iovcnt,
                     uint32_t flags,
                     fvd_done_fn *done,
                     void *opaque);

/**
 * Writes iov at guest byte offset. The array and the memory stay valid until
 * done. flags: FVD_REQ_FUA.
 */
void fvd_submit_write(struct fvd_queue *queue,
                      uint64_t offset,
                      const struct iovec *iov,
                      int iovcnt,
                      uint32_t flags,
                      fvd_done_fn *done,
                      void *opaque);

/**
 * Makes every request that completed before durable.
 */
void fvd_submit_flush(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);

/**
 * Makes a range read as zero. flags: FVD_REQ_FUA, FVD_REQ_MAY_UNMAP.
 */
void fvd_submit_write_zeroes(struct fvd_queue *queue,
                             uint64_t offset,
                             uint64_t len,
                             uint32_t flags,
                             fvd_done_fn *done,
                             void *opaque);

/**
 * The range's content is not needed any more: each part reads as before or
 * as zero afterwards.
 */
void fvd_submit_discard(struct fvd_queue *queue,
                        uint64_t offset,
                        uint64_t len,
                        fvd_done_fn *done,
                        void *opaque);

/**
 * Changes the virtual size. flags: FVD_REQ_ZEROED.
 */
void fvd_submit_resize(struct fvd_queue *queue,
                       uint64_t size,
                       uint32_t flags,
                       fvd_done_fn *done,
                       void *opaque);

/**
 * Where a range's content is. out stays valid until done.
 */
void fvd_submit_block_status(struct fvd_queue *queue,
                             uint64_t offset,
                             uint64_t len,
                             struct fvd_block_status *out,
                             fvd_done_fn *done,
                             void *opaque);

/**
 * Records another base: the names are copied. name NULL or empty: none. What
 * the guest sees of the base follows the host's FVD_FILE_BASE. No byte of the
 * disk that is in the image changes; where the bitmap does not reach as far as
 * the new base (of unknown length, if the host has none now), it is enlarged.
 */
void fvd_submit_change_base(struct fvd_queue *queue,
                            const char *name,
                            const char *format,
                            fvd_done_fn *done,
                            void *opaque);

/**
 * Changes options of creation, all or none, in one step that a crash does not
 * divide; durable when it is done. Only the growth step can change; another
 * value than the image has of anything else is -ENOTSUP, and so is a growth
 * step for an image that is not compact. params is copied. The size and the
 * base have requests of their own.
 */
void fvd_submit_amend(struct fvd_queue *queue,
                      const struct fvd_amend *params,
                      fvd_done_fn *done,
                      void *opaque);

/**
 * Gives every block back to the base, in one step that a crash does not
 * divide: the disk reads as the base does. For a disk whose content was written
 * to its base. -ENOTSUP without a base.
 */
void fvd_submit_make_empty(struct fvd_queue *queue, fvd_done_fn *done, void *opaque);

/**
 * Checks the image. out stays valid until done. finding, unless NULL, is
 * called with opaque for each finding (100 at most), right before done.
 *
 * flags: 0 only looks; FVD_CHECK_REPAIR_LEAKS gives back what lies behind the
 * end of the image in its file; FVD_CHECK_REPAIR_ALL also repairs damage.
 * Nothing is invented: what damaged metadata spoke of reads afterwards as the
 * base does, or as zero, and is told by findings. The image must be open for
 * writing (-EROFS); every other write waits meanwhile. A crash leaves an image
 * that can be repaired again.
 */
void fvd_submit_check(struct fvd_queue *queue,
                      struct fvd_check *out,
                      uint32_t flags,
                      fvd_finding_fn *finding,
                      fvd_done_fn *done,
                      void *opaque);

/**
 * The library's version: major << 16 | minor << 8 | patch.
 */
uint32_t fvd_version(void);

/**
 * The library's version as text.
 */
const char *fvd_version_string(void);

/**
 * What a file that starts with these len bytes is: 2: an FVD image of
 * version 2; 1: of version 1, which this library cannot open; 0: something
 * else. 64 bytes are enough, less than 8 are never an image.
 */
int fvd_probe(const void *buf, size_t len);

#ifdef __cplusplus
} /* extern "C" */
#endif  /* __cplusplus */

#endif  /* FVD_H */
