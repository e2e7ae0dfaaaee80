/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Copies an image's content to a raw file, several requests at a time, by a poll loop. */
#include <errno.h>
#include <fcntl.h>
#include <fvd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEPTH 8
#define PIECE (1 << 20)

struct copy {
    struct fvd_file *file;
    int to;
    uint64_t next, size;
    int under_way, failed;
};

struct piece {
    struct copy *copy;
    uint64_t offset;
    struct iovec iov;
};

static void submit(struct piece *piece);

static void piece_done(void *opaque, int64_t ret, const char *error)
{
    struct piece *piece = opaque;
    struct copy *copy = piece->copy;

    copy->under_way--;
    if (ret < 0) {
        fprintf(stderr, "reading at %llu: %s\n", (unsigned long long)piece->offset, error);
        copy->failed = 1;
        return;
    }
    for (size_t at = 0; at < piece->iov.iov_len;) {
        ssize_t n = pwrite(copy->to, (char *)piece->iov.iov_base + at, piece->iov.iov_len - at,
                           (off_t)(piece->offset + at));
        if (n < 0 && errno != EINTR) {
            perror("writing");
            copy->failed = 1;
            return;
        }
        at += n > 0 ? (size_t)n : 0;
    }
    submit(piece);
}

static void submit(struct piece *piece)
{
    struct copy *copy = piece->copy;
    uint64_t left = copy->size - copy->next;

    if (left == 0 || copy->failed) {
        return;
    }
    piece->offset = copy->next;
    piece->iov.iov_len = left < PIECE ? (size_t)left : PIECE;
    copy->next += piece->iov.iov_len;
    copy->under_way++;
    fvd_submit_read(fvd_file_queue(copy->file), piece->offset, &piece->iov, 1, 0, piece_done, piece);
}

int main(int argc, char **argv)
{
    struct fvd_file_options options = {
        .struct_size = sizeof(options),
        .flags = FVD_OPEN_RDONLY | FVD_FILE_ALLOW_BASE,
    };
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct copy copy = { 0 };
    struct piece pieces[DEPTH];

    if (argc != 3) {
        fprintf(stderr, "usage: %s IMAGE RAW\n", argv[0]);
        return 2;
    }
    if (fvd_file_open(argv[1], &options, &copy.file) < 0 || fvd_image_info(fvd_file_image(copy.file), &info) < 0) {
        fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
        fvd_file_close(&copy.file);
        return 1;
    }
    copy.size = info.virtual_size;
    copy.to = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (copy.to < 0 || ftruncate(copy.to, (off_t)copy.size) < 0) {
        perror(argv[2]);
        fvd_file_close(&copy.file);
        return 1;
    }
    for (int i = 0; i < DEPTH; i++) {
        pieces[i] = (struct piece){ .copy = &copy, .iov = { .iov_base = malloc(PIECE) } };
        if (!pieces[i].iov.iov_base) {
            return 1;
        }
        submit(&pieces[i]);
    }
    while (copy.under_way > 0) {
        struct pollfd events = { .fd = fvd_file_fd(copy.file), .events = POLLIN };
        poll(&events, 1, -1);
        if (fvd_file_process(copy.file, 0) < 0) {
            fprintf(stderr, "%s\n", fvd_error());
            return 1;
        }
    }
    for (int i = 0; i < DEPTH; i++) {
        free(pieces[i].iov.iov_base);
    }
    if (fvd_file_close(&copy.file) < 0) {
        fprintf(stderr, "%s\n", fvd_error());
        copy.failed = 1;
    }
    return copy.failed || close(copy.to) < 0;
}
