#include "optrot_r4.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TENSOR "ffn_swiglu-"  // and the layer: the input of ffn_down in llama.cpp's graph
#define FORMAT_VERSION 1
#define MAX_SIZE (1 << 24)    // of what a header may say of a model

struct optrot_r4 {
    int block, width, layers;
    struct llama_model_kv_override overrides[2];  // the empty key of the second ends the list
    bool failed;
    uint32_t * counts;  // [layers] transforms since optrot_r4_begin
    float * scratch;    // for tensors that are not in host memory; kept at the size of the largest seen
    size_t scratch_bytes;
};

// The unsigned number under `key`, or 0.
static uint32_t read_u32(const struct gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, key);
    return id >= 0 && gguf_get_kv_type(file, id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(file, id) : 0;
}

static const char * read_string(const struct gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, key);
    return id >= 0 && gguf_get_kv_type(file, id) == GGUF_TYPE_STRING ? gguf_get_val_str(file, id) : "";
}

static uint32_t read_size(const struct gguf_context * file, const char * base, const char * name) {
    char key[192];
    snprintf(key, sizeof key, "%s.%s", base, name);
    return read_u32(file, key);
}

static int read_marks(struct optrot_r4 * r4, const struct gguf_context * file) {
    const char * base = read_string(file, "optrot.base_architecture");
    struct llama_model_kv_override * override = &r4->overrides[0];
    const uint32_t version = read_u32(file, "optrot.format_version"), block = read_u32(file, "optrot.r4_block");
    if (version > FORMAT_VERSION) {
        return OPTROT_R4_NEWER;
    }
    if (version == 0 || base[0] == '\0' || strlen(base) >= sizeof override->val_str) {
        return OPTROT_R4_BAD_MARKS;
    }
    const uint32_t width = read_size(file, base, "feed_forward_length"), layers = read_size(file, base, "block_count");
    if (block < 2 || (block & (block - 1)) != 0 || width > MAX_SIZE || layers > MAX_SIZE || width < block ||
        width % block != 0 || layers == 0) {
        return OPTROT_R4_BAD_MARKS;
    }
    override->tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    strcpy(override->key, "general.architecture");
    strcpy(override->val_str, base);
    r4->block = (int) block;
    r4->width = (int) width;
    r4->layers = (int) layers;
    r4->counts = calloc(layers, sizeof *r4->counts);
    return r4->counts ? OPTROT_R4_OK : OPTROT_R4_NO_MEMORY;
}

// Whether the file is marked at all.
static bool is_marked(const struct gguf_context * file) {
    static const char suffix[] = "-optrot";
    const char * architecture = read_string(file, "general.architecture");
    const size_t length = strlen(architecture), tail = sizeof suffix - 1;
    return gguf_find_key(file, "optrot.r4_block") >= 0 ||
           (length > tail && strcmp(architecture + length - tail, suffix) == 0);
}

int optrot_r4_open(const char * path, struct optrot_r4 ** out) {
    *out = NULL;
    struct gguf_context * file = gguf_init_from_file(path, (struct gguf_init_params) { .no_alloc = true, .ctx = NULL });
    if (!file) {
        return OPTROT_R4_NO_FILE;
    }
    int status = OPTROT_R4_OK;
    if (is_marked(file)) {
        struct optrot_r4 * r4 = calloc(1, sizeof *r4);
        status = r4 ? read_marks(r4, file) : OPTROT_R4_NO_MEMORY;
        if (status == OPTROT_R4_OK) {
            *out = r4;
        } else {
            optrot_r4_free(r4);
        }
    }
    gguf_free(file);
    return status;
}

void optrot_r4_free(struct optrot_r4 * r4) {
    if (r4) {
        free(r4->counts);
        free(r4->scratch);
        free(r4);
    }
}

const struct llama_model_kv_override * optrot_r4_override(const struct optrot_r4 * r4) {
    return r4 ? r4->overrides : NULL;
}

void optrot_r4_model_params(struct optrot_r4 * r4, struct llama_model_params * params) {
    if (r4) {
        params->kv_overrides = r4->overrides;
    }
}

void optrot_r4_context_params(struct optrot_r4 * r4, struct llama_context_params * params) {
    if (r4) {
        params->cb_eval = optrot_r4_eval;
        params->cb_eval_user_data = r4;
    }
}

// The first three stages of a transform, on 8 neighbours.
static inline void transform_8(float * x) {
    const float a0 = x[0] + x[1], a1 = x[0] - x[1], a2 = x[2] + x[3], a3 = x[2] - x[3];
    const float a4 = x[4] + x[5], a5 = x[4] - x[5], a6 = x[6] + x[7], a7 = x[6] - x[7];
    const float b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3;
    const float b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7;
    x[0] = b0 + b4; x[1] = b1 + b5; x[2] = b2 + b6; x[3] = b3 + b7;
    x[4] = b0 - b4; x[5] = b1 - b5; x[6] = b2 - b6; x[7] = b3 - b7;
}

// One stage: sums and differences of two runs. Compilers turn this loop into vector instructions.
static inline void butterflies(float * restrict low, float * restrict high, int count) {
    for (int i = 0; i < count; i++) {
        const float a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
    }
}

void optrot_r4_transform(float * x, int64_t n, int block) {
    const float scale = 1.0f / sqrtf((float) block);
    for (float * end = x + n; x < end; x += block) {
        int step = 1;
        if (block >= 8) {
            for (int i = 0; i < block; i += 8) {
                transform_8(x + i);
            }
            step = 8;
        }
        for (; step < block; step *= 2) {
            for (int i = 0; i < block; i += 2 * step) {
                butterflies(x + i, x + i + step, step);
            }
        }
        for (int i = 0; i < block; i++) {
            x[i] *= scale;
        }
    }
}

// The layer whose ffn_down reads this tensor, or -1.
static int layer_of(const struct optrot_r4 * r4, const char * name) {
    if (strncmp(name, TENSOR, sizeof TENSOR - 1) != 0) {
        return -1;
    }
    char * end;
    const char * digits = name + sizeof TENSOR - 1;
    const long layer = strtol(digits, &end, 10);
    return end != digits && *end == '\0' && layer >= 0 && layer < r4->layers ? (int) layer : -1;
}

static bool reserve(struct optrot_r4 * r4, size_t bytes) {
    if (bytes > r4->scratch_bytes) {
        float * scratch = realloc(r4->scratch, bytes);
        if (!scratch) {
            return false;
        }
        r4->scratch = scratch;
        r4->scratch_bytes = bytes;
    }
    return true;
}

static bool apply(struct optrot_r4 * r4, struct ggml_tensor * tensor) {
    if (tensor->type != GGML_TYPE_F32 || !ggml_is_contiguous(tensor) || tensor->ne[0] != r4->width) {
        return false;
    }
    const int64_t n = ggml_nelements(tensor);
    if (n == 0) {  // the last layer of a batch that wants no logits
        return true;
    }
    const struct ggml_tensor * owner = tensor->view_src ? tensor->view_src : tensor;
    if (ggml_backend_buffer_is_host(owner->buffer)) {
        optrot_r4_transform(tensor->data, n, r4->block);
        return true;
    }
    if (!reserve(r4, ggml_nbytes(tensor))) {
        return false;
    }
    ggml_backend_tensor_get(tensor, r4->scratch, 0, ggml_nbytes(tensor));
    optrot_r4_transform(r4->scratch, n, r4->block);
    ggml_backend_tensor_set(tensor, r4->scratch, 0, ggml_nbytes(tensor));
    return true;
}

bool optrot_r4_eval(struct ggml_tensor * tensor, bool ask, void * data) {
    struct optrot_r4 * r4 = data;
    const int layer = layer_of(r4, tensor->name);
    if (ask || layer < 0) {
        return layer >= 0;
    }
    if (!apply(r4, tensor)) {
        r4->failed = true;
        return false;
    }
    r4->counts[layer]++;
    return true;
}

void optrot_r4_begin(struct optrot_r4 * r4) {
    if (r4) {
        r4->failed = false;
        memset(r4->counts, 0, (size_t) r4->layers * sizeof *r4->counts);
    }
}

int optrot_r4_check(const struct optrot_r4 * r4) {
    for (int layer = 0; r4 && layer < r4->layers; layer++) {
        if (r4->failed || r4->counts[layer] == 0 || r4->counts[layer] != r4->counts[0]) {
            return OPTROT_R4_NOT_APPLIED;
        }
    }
    return OPTROT_R4_OK;
}

int32_t optrot_r4_decode(struct optrot_r4 * r4, struct llama_context * context, struct llama_batch batch) {
    optrot_r4_begin(r4);
    const int32_t code = llama_decode(context, batch);
    return code != 0 ? code : optrot_r4_check(r4);
}

const char * optrot_r4_strerror(int status) {
    switch (status) {
        case OPTROT_R4_OK:          return "no error";
        case OPTROT_R4_NO_FILE:     return "the file cannot be read, or is not a GGUF";
        case OPTROT_R4_BAD_MARKS:   return "the file's optrot.* keys are incomplete or do not fit the model; export it again";
        case OPTROT_R4_NEWER:       return "the file is of a newer format; update optrot_r4.c";
        case OPTROT_R4_NO_MEMORY:   return "out of memory";
        case OPTROT_R4_NOT_APPLIED: return "this llama.cpp's graph has no ffn_swiglu in every layer, so R4 was not applied";
        default:                    return "llama_decode failed";
    }
}
