// R4 of optrot-edge's GGUF files in an unmodified llama.cpp.
//
// Such a file says `general.architecture` = "llama-optrot", which llama.cpp refuses to load. The functions here load it
// as its base architecture and have llama.cpp transform what every ffn_down reads, through an eval callback:
//
//     struct optrot_r4 * r4;
//     int status = optrot_r4_open("model.gguf", &r4);       // r4 is NULL for a file without R4; NULL is fine below
//     if (status != OPTROT_R4_OK) fail(optrot_r4_strerror(status));
//     optrot_r4_model_params(r4, &model_params);             // before llama_model_load_from_file
//     optrot_r4_context_params(r4, &context_params);         // before llama_init_from_model
//     status = optrot_r4_decode(r4, context, batch);         // instead of llama_decode
//     optrot_r4_free(r4);                                    // after llama_free
//
// One object serves one context. A transform that did not take place is an error of optrot_r4_decode, never a wrong
// answer.

#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    OPTROT_R4_OK          =  0,
    OPTROT_R4_NO_FILE     = -1001,  // not a readable GGUF
    OPTROT_R4_BAD_MARKS   = -1002,  // the optrot.* keys are incomplete, or do not fit the model
    OPTROT_R4_NEWER       = -1003,  // the file is of a newer format
    OPTROT_R4_NO_MEMORY   = -1004,
    OPTROT_R4_NOT_APPLIED = -1005,  // this llama.cpp's graph is another one; the logits are wrong
};

struct optrot_r4;

// Reads the file's marks. Returns OPTROT_R4_OK or one of the errors above, with *r4 then NULL.
int optrot_r4_open(const char * path, struct optrot_r4 ** r4);

// Sets params->kv_overrides. An app with overrides of its own adds the entry that optrot_r4_override gives instead.
void optrot_r4_model_params(struct optrot_r4 * r4, struct llama_model_params * params);
const struct llama_model_kv_override * optrot_r4_override(const struct optrot_r4 * r4);

// Sets params->cb_eval and params->cb_eval_user_data.
void optrot_r4_context_params(struct optrot_r4 * r4, struct llama_context_params * params);

// llama_decode, checked: what it returns, or OPTROT_R4_NOT_APPLIED.
int32_t optrot_r4_decode(struct optrot_r4 * r4, struct llama_context * context, struct llama_batch batch);

void optrot_r4_free(struct optrot_r4 * r4);

const char * optrot_r4_strerror(int status);

// The parts of optrot_r4_decode, for apps that call llama_decode by other ways: begin before it, check after it.
void optrot_r4_begin(struct optrot_r4 * r4);
int  optrot_r4_check(const struct optrot_r4 * r4);
bool optrot_r4_eval(struct ggml_tensor * tensor, bool ask, void * r4);

// Normalised Walsh-Hadamard transform, in place, of n floats in blocks of `block`, a power of two that divides n.
void optrot_r4_transform(float * x, int64_t n, int block);

#ifdef __cplusplus
}
#endif
