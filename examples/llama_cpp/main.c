// One answer of a GGUF, with or without R4: optrot-chat MODEL.gguf "question" [tokens] [threads]

#include "optrot_r4.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void log_errors(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static void fail(const char * what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

// The question in the model's own chat template. The caller frees it.
static char * prompt_of(const struct llama_model * model, const char * question) {
    const char * template = llama_model_chat_template(model, NULL);
    if (!template) {
        fail("the file holds no chat template");
    }
    const struct llama_chat_message message = { "user", question };
    const int32_t length = llama_chat_apply_template(template, &message, 1, true, NULL, 0);
    if (length < 0) {
        fail("llama.cpp does not know the file's chat template");
    }
    char * prompt = malloc((size_t) length + 1);
    if (!prompt) {
        fail("out of memory");
    }
    llama_chat_apply_template(template, &message, 1, true, prompt, length);
    prompt[length] = '\0';
    return prompt;
}

// Token ids of the prompt. The caller frees them.
static llama_token * tokens_of(const struct llama_vocab * vocab, const char * prompt, int32_t * count) {
    const int32_t length = (int32_t) strlen(prompt);
    const llama_token bos = llama_vocab_bos(vocab);
    const char * mark = bos >= 0 ? llama_vocab_get_text(vocab, bos) : "";
    const bool has_bos = mark[0] != '\0' && strncmp(prompt, mark, strlen(mark)) == 0;
    *count = -llama_tokenize(vocab, prompt, length, NULL, 0, !has_bos, true);
    llama_token * tokens = malloc((size_t) *count * sizeof *tokens);
    if (!tokens || llama_tokenize(vocab, prompt, length, tokens, *count, !has_bos, true) < 0) {
        fail("the question cannot be tokenised");
    }
    return tokens;
}

int main(int argc, char ** argv) {
    if (argc < 3 || argc > 5) {
        fail("usage: optrot-chat MODEL.gguf \"question\" [tokens] [threads]");
    }
    const int32_t wanted = argc > 3 ? atoi(argv[3]) : 256, threads = argc > 4 ? atoi(argv[4]) : 4;
    llama_log_set(log_errors, NULL);
    llama_backend_init();

    struct optrot_r4 * r4;
    const int status = optrot_r4_open(argv[1], &r4);
    if (status != OPTROT_R4_OK) {
        fail(optrot_r4_strerror(status));
    }
    struct llama_model_params model_params = llama_model_default_params();
    optrot_r4_model_params(r4, &model_params);
    struct llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        fail("llama.cpp cannot load the file");
    }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    char * prompt = prompt_of(model, argv[2]);
    int32_t count;
    llama_token * tokens = tokens_of(vocab, prompt, &count);

    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (count + wanted);
    params.n_batch = (uint32_t) count;
    params.n_threads = params.n_threads_batch = threads;
    optrot_r4_context_params(r4, &params);
    struct llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("llama.cpp cannot make a context");
    }
    struct llama_sampler * sampler = llama_sampler_init_greedy();
    struct llama_batch batch = llama_batch_get_one(tokens, count);
    llama_token token;
    for (int32_t written = 0; written < wanted; written++) {
        const int32_t code = optrot_r4_decode(r4, context, batch);
        if (code != 0) {
            fail(optrot_r4_strerror(code));
        }
        token = llama_sampler_sample(sampler, context, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char piece[256];
        const int32_t length = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
        if (length > 0) {
            fwrite(piece, 1, (size_t) length, stdout);
            fflush(stdout);
        }
        batch = llama_batch_get_one(&token, 1);
    }
    putchar('\n');
    llama_sampler_free(sampler);
    llama_free(context);
    llama_model_free(model);
    optrot_r4_free(r4);
    free(tokens);
    free(prompt);
    llama_backend_free();
    return 0;
}
