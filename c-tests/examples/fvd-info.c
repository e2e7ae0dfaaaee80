/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Prints what an image says of itself. */
#include <fvd.h>
#include <inttypes.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    /* Nothing but the header is read: the image may be in use, or hostile. */
    struct fvd_file_options options = {
        .struct_size = sizeof(options),
        .flags = FVD_OPEN_RDONLY | FVD_OPEN_NO_IO | FVD_FILE_NO_LOCK,
    };
    struct fvd_info info = { .struct_size = sizeof(info) };
    struct fvd_file *file;

    if (argc != 2) {
        fprintf(stderr, "usage: %s IMAGE\n", argv[0]);
        return 2;
    }
    if (fvd_file_open(argv[1], &options, &file) < 0) {
        fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
        return 1;
    }
    if (fvd_image_info(fvd_file_image(file), &info) < 0) {
        fprintf(stderr, "%s: %s\n", argv[1], fvd_error());
        fvd_file_close(&file);
        return 1;
    }
    printf("virtual size: %" PRIu64 " bytes\n", info.virtual_size);
    printf("closed cleanly: %s\n", info.flags & FVD_INFO_CLEAN ? "yes" : "no");
    if (info.base_name[0]) {
        printf("base: %s (%s)\n", info.base_name, info.base_format);
        printf("block size: %" PRIu32 " bytes, %" PRIu64 " blocks\n", info.block_size, info.blocks);
    }
    if (info.flags & FVD_INFO_HAS_BASE_LENGTH) {
        printf("base length: %" PRIu64 " bytes\n", info.base_length);
    }
    return fvd_file_close(&file) < 0;
}
