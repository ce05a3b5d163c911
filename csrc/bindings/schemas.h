// The operators' schemas, the same for every library that has them.
#pragma once

namespace quicksilver {

template <typename Library>
void define_schemas(Library& m) {
  m.def(
      "halting_update(Tensor hidden, Tensor previous, Tensor? entropy, Tensor halted, Tensor positions, "
      "float drift_threshold, bool relative=True, float? entropy_threshold=None, int sink_tokens=0, "
      "Tensor? overrides=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("softmax_entropy(Tensor hidden) -> Tensor");
  m.def(
      "kv_allocate(Tensor sequence, Tensor positions, Tensor(a!) kv_lengths, Tensor(b!) block_table, "
      "Tensor(c!) kv_positions, Tensor(d!)? kv_until, Tensor(e!) blocks_used, Tensor? free_blocks=None, "
      "int window=0) -> Tensor");
  m.def(
      "kv_scatter(Tensor key, Tensor value, Tensor slot_mapping, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> ()");
  m.def(
      "kv_merge(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor destination, Tensor first, Tensor second, "
      "Tensor weight_first, Tensor weight_second, Tensor distance, Tensor? cosine, Tensor? sine, "
      "Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> ()");
  m.def(
      "compacted_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor kv_positions, Tensor kv_lengths, Tensor query_positions, Tensor query_sequence, float scale, "
      "Tensor? kv_until=None, Tensor? key_scale=None, Tensor? value_scale=None) -> Tensor");
  m.def(
      "attention_lse(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor kv_positions, "
      "Tensor kv_lengths, Tensor query_positions, Tensor query_sequence, float scale, Tensor? kv_until=None, "
      "Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor, Tensor)");
  m.def(
      "fusion_groups(Tensor hidden, Tensor positions, Tensor sequence, Tensor fusible, float tau, bool relative=True, "
      "int max_group=4) -> (Tensor, Tensor)");
  m.def("fusion_reduce(Tensor hidden, Tensor weight, Tensor group, int? groups=None) -> Tensor");
  m.def("fusion_expand(Tensor fused, Tensor group) -> Tensor");
  m.def(
      "matryoshka_gemm(Tensor x, Tensor hi, Tensor? lo, Tensor scale, Tensor? bits, Tensor? bias, Tensor offset) "
      "-> Tensor");
  m.def("quantize_rows(Tensor x, int group_size) -> (Tensor, Tensor, Tensor)");
}

}  // namespace quicksilver
