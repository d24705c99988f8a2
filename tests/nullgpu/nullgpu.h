/* Shared by the parts of the null GPU: what is counted, and the card that it poses as. */
#pragma once
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

/* tests/nullgpu/gpu.py has the same order. */
enum { KERNELS, PRODUCTS, TRITON, TO_DEVICE, TO_HOST, SYNCS, NUM_COUNTERS };

typedef struct {
    const char *name;
    int capability; /* 10 x major + minor */
    int multiprocessors;
    int shared_memory;      /* bytes of one multiprocessor */
    int block_shared_memory; /* bytes that one block may ask for */
} Card;

/* The card of NULLGPU_CAPABILITY; figures from NVIDIA's CUDA programming guide, "Compute Capabilities". */
static inline const Card *card(void) {
    static const Card cards[] = {
        {"NVIDIA A100-SXM4-40GB", 80, 108, 167936, 166912},
        {"NVIDIA GeForce RTX 4090", 89, 128, 102400, 101376},
        {"NVIDIA H100 80GB HBM3", 90, 132, 233472, 232448},
    };
    const char *wanted = getenv("NULLGPU_CAPABILITY");
    int capability = wanted ? atoi(wanted) : 80;
    for (unsigned i = 0; i < sizeof cards / sizeof *cards; i++)
        if (cards[i].capability == capability)
            return &cards[i];
    return &cards[0];
}

static inline size_t card_bytes(void) {
    const char *gib = getenv("NULLGPU_GIB");
    return (size_t)((gib ? atof(gib) : 40.0) * (1ull << 30));
}
