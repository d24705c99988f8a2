/* cuBLAS without a GPU: handles and descriptions exist, and a product is a launch that computes nothing. */
#include "nullgpu.h"
#include <string.h>

extern long null_counts[NUM_COUNTERS];
static int handle_of_everyone;

EXPORT int cublasCreate_v2(void **handle) { return *handle = &handle_of_everyone, 0; }
EXPORT int cublasLtCreate(void **handle) { return *handle = &handle_of_everyone, 0; }
EXPORT int cublasGetStream_v2(void *handle, void **stream) { return *stream = NULL, 0; }
EXPORT int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, 0; }

#define PRODUCT(name)                                                                                                 \
    EXPORT int name(void *handle, ...) { return null_counts[PRODUCTS]++, 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmEx_64)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemm_v2_64)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasLtMatmul)

static int describe(void **description) { return !(*description = calloc(1, 512)); }
static int forget(void *description) { return free(description), 0; }
EXPORT int cublasLtMatmulDescCreate(void **description, int compute, int scale) { return describe(description); }
EXPORT int cublasLtMatmulDescDestroy(void *description) { return forget(description); }
EXPORT int cublasLtMatrixLayoutCreate(void **layout, int type, unsigned long long rows, unsigned long long columns,
                                      long long stride) {
    return describe(layout);
}
EXPORT int cublasLtMatrixLayoutDestroy(void *layout) { return forget(layout); }
EXPORT int cublasLtMatmulPreferenceCreate(void **preference) { return describe(preference); }
EXPORT int cublasLtMatmulPreferenceDestroy(void *preference) { return forget(preference); }
/* One algorithm; 96 is sizeof(cublasLtMatmulHeuristicResult_t), whose zeros say success and no workspace. */
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                          void *preference, int most, char *results, int *found) {
    memset(results, 0, 96);
    return *found = 1, 0;
}
