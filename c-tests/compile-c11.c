/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header is good c11 without extensions; constants have the values that programs rely on. */
#include <fvd.h>

int main(void)
{
    struct fvd_config config = { 0 };
    struct fvd_image *image = 0;
    int64_t data = FVD_STATUS_DATA;

    config.struct_size = sizeof(config);
    return !(fvd_image_new(0, &config, &image) < 0 && image == 0 && data == (int64_t)1 << 62 &&
             FVD_LOOKUP_ASK == 0 && FVD_LOOKUP_DATA == 1);
}
