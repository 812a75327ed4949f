// Logits of token ids in one llama_decode: r4_logits MODEL OUT cache n_ubatch id...   (OUT: float32 [ids, vocabulary])
// cache: f32, for keys and values in float32 and no flash attention, or default.
// Before that the same ids are decoded with no logits wanted.

#include "ggml-backend.h"
#include "optrot_r4.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The linker puts it in the place of ggml's function where it is told to wrap that: no buffer is the host's.
bool __wrap_ggml_backend_buffer_is_host(ggml_backend_buffer_t buffer);
bool __wrap_ggml_backend_buffer_is_host(ggml_backend_buffer_t buffer) {
    (void) buffer;
    return false;
}

static int stop(const char * what, int status) {
    fprintf(stderr, "%s: %s\n", what, optrot_r4_strerror(status));
    return 1;
}

int main(int argc, char ** argv) {
    const int n = argc - 5;
    struct optrot_r4 * r4;
    int status = optrot_r4_open(argv[1], &r4);
    if (status != OPTROT_R4_OK) {
        return stop("open", status);
    }
    struct llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    optrot_r4_model_params(r4, &model_params);
    struct llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return stop("load", 1);
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 256;
    params.n_ubatch = (uint32_t) atoi(argv[4]);
    params.n_threads = params.n_threads_batch = 1;
    if (strcmp(argv[3], "f32") == 0) {
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // it would compute in float16
    }
    optrot_r4_context_params(r4, &params);
    struct llama_context * context = llama_init_from_model(model, params);
    struct llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = atoi(argv[5 + i]);
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
    }
    for (int wanted = 0; wanted < 2; wanted++) {
        llama_memory_clear(llama_get_memory(context), true);
        for (int i = 0; i < n; i++) {
            batch.logits[i] = (int8_t) wanted;
        }
        status = optrot_r4_decode(r4, context, batch);
        if (status != 0) {
            return stop(wanted ? "decode" : "decode without logits", status);
        }
    }
    FILE * out = fopen(argv[2], "wb");
    const size_t size = (size_t) n * (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    const size_t written = fwrite(llama_get_logits(context), sizeof(float), size, out);
    fclose(out);
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    optrot_r4_free(r4);
    return written == size ? 0 : 1;
}
