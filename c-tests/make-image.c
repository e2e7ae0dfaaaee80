/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Makes an image for the tests of the examples: SIZE bytes, over BASE if given; block 3 is all 'x'. */
#include <fvd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    struct fvd_file_options options = { .struct_size = sizeof(options), .flags = FVD_FILE_ALLOW_BASE };
    struct fvd_create params = { .struct_size = sizeof(params), .block_size = 4096, .journal_size = 1 << 20 };
    struct fvd_file *file;
    char block[4096];

    if (argc < 3) {
        return 2;
    }
    params.virtual_size = strtoull(argv[2], NULL, 10);
    if (argc > 3) {
        params.base_name = argv[3];
        params.base_format = "raw";
    }
    memset(block, 'x', sizeof(block));
    if (fvd_file_create(argv[1], &params, &options) < 0 || fvd_file_open(argv[1], &options, &file) < 0 ||
        fvd_file_pwrite(file, block, sizeof(block), 3 * 4096) != sizeof(block) || fvd_file_close(&file) < 0) {
        fprintf(stderr, "%s\n", fvd_error());
        return 1;
    }
    return 0;
}
