"""Why an architecture is not supported, in words, where the error that its tracing ends with does not say so."""

REASONS = {
    "BigBirdForCausalLM": "its model cuts a table of token types to the number of tokens of one sequence; a step has many sequences",
    "BltForCausalLM": "its patches are cut from the bytes of a whole prompt by their entropy, so that shapes depend on values",
    "CpmAntForCausalLM": "its prompt tokens and segments see later tokens, and its position bias is made for a whole prompt at a time",
    "DeepseekV4ForCausalLM": "its compressed attention makes a key of every so many tokens; the dialect has no cache that grows by blocks",
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm; the language model alone, Gemma3nForCausalLM, is supported",
    "Gemma4AssistantForCausalLM": "it drafts for a larger Gemma 4 and reads that model's cache; alone it is no language model",
    "Gemma4UnifiedForConditionalGeneration": "the tokens of an image see one another (block_sequence_ids), which paged attention does not know",
    "Gemma4UnifiedAssistantForCausalLM": "it drafts for a larger Gemma 4 and reads that model's cache; alone it is no language model",
    "GitForCausalLM": "the tokens of an image see one another (block_sequence_ids), which paged attention does not know",
    "Inkling2ForCausalLM": "its scores have a learned bias for each distance, which paged attention does not know",
    "InklingForCausalLM": "its scores have a learned bias for each distance, which paged attention does not know",
    "MusicgenForCausalLM": "it decodes several codebooks of audio at once: a token is a vector of ids",
    "MusicgenMelodyForCausalLM": "it decodes several codebooks of audio at once: a token is a vector of ids",
    "ProphetNetForCausalLM": "it predicts several tokens ahead in streams of their own, whose scores have a bias for each bucket of distances",
    "Qwen4ExpForCausalLM": "its defaults in transformers describe no model (sizes are missing), so that there is nothing to try",
    "ReformerModelWithLMHead": "its local and hashed attention cut a sequence into chunks of a fixed length",
    "XLMWithLMHeadModel": "its code reads the number of padding tokens of a batch on the host",
    "XLNetLMHeadModel": "it is trained on permutations and attends in both directions",
    "xLSTMForCausalLM": "its matrix memory is updated by kernels that take chunks of whole sequences; the dialect has no such op",
    "XmodForCausalLM": "its adapters pick tokens by their language, so that shapes depend on values",
}
"""By architecture; tests check that the oracle refuses each of them."""
