"""Loading, encoding, decoding and export of policies."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import tiny
from prefloop.errors import ConfigError, DataError
from prefloop.models import causal_lm
from prefloop.rows import VERBATIM, Message, Prompt, prompt_id


@pytest.fixture(autouse=True)
def _nothing_kept():
    causal_lm.forget()
    yield
    causal_lm.forget()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_policy(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def policy(saved: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def prompt_of(*messages: tuple[str, str]) -> Prompt:
    turns = tuple(Message(*message) for message in messages)
    return Prompt(prompt_id(turns), turns, None, "train", "prompts.jsonl:7")


# Loading


def test_load_gives_a_quiet_model_for_reading(policy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lm = causal_lm.load(str(policy), device="cpu")
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.model.dtype == torch.float32
    assert (lm.path, lm.digest, lm.device.type) == (str(policy), causal_lm.folder_digest(policy), "cpu")
    assert capfd.readouterr() == ("", "")


def test_precision_is_fp32_on_cpu_unless_asked_otherwise(policy: Path) -> None:
    assert causal_lm.load(str(policy), precision="bf16", device="cpu").model.dtype == torch.bfloat16
    assert causal_lm.load(str(policy), precision="fp32", device="cpu").model.dtype == torch.float32


def test_same_files_are_loaded_once_and_shared(policy: Path, tmp_path: Path) -> None:
    first = causal_lm.load(str(policy))
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    second = causal_lm.load(str(copy))
    assert second.model is first.model
    assert second.path == str(copy)
    causal_lm.forget()
    assert causal_lm.load(str(policy)).model is not first.model


def test_two_models_are_kept(tmp_path: Path) -> None:
    folders = [str(tiny.save_tiny_policy(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    first, second, _ = [causal_lm.load(folder).model for folder in folders]
    assert causal_lm.load(folders[1]).model is second
    assert causal_lm.load(folders[0]).model is not first


def test_changed_weights_are_loaded_anew(policy: Path) -> None:
    before = causal_lm.load(str(policy))
    weights = load_file(policy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, policy / "new", metadata={"format": "pt"})
    (policy / "new").replace(policy / "model.safetensors")
    after = causal_lm.load(str(policy))
    assert after.digest != before.digest
    assert not torch.equal(after.model.lm_head.weight, before.model.lm_head.weight)


def test_model_to_train_is_not_shared(policy: Path) -> None:
    shared = causal_lm.load(str(policy))
    own = causal_lm.load(str(policy), cache=False)
    assert own.model is not shared.model
    assert all(p.requires_grad for p in own.model.parameters())
    assert causal_lm.load(str(policy)).model is shared.model


def test_stop_ids_come_from_everywhere(policy: Path) -> None:
    assert causal_lm.load(str(policy)).stop_ids == {1, 2}  # beginning and end of sequence
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40]}))
    assert causal_lm.load(str(policy)).stop_ids == {1, 2, 40}


# Finding


def test_digest_covers_what_makes_the_policy(policy: Path) -> None:
    before = causal_lm.folder_digest(policy)
    (policy / "checkpoint").mkdir()
    for name in ("README.md", "manifest.json", "key.json", "part-00000.parquet", "checkpoint/model.safetensors"):
        (policy / name).write_text("x")
    os.utime(policy / "config.json", (1, 1))
    assert causal_lm.folder_digest(policy) == before
    digests = {before}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        with (policy / name).open("a") as file:
            file.write(" ")
        digests.add(causal_lm.folder_digest(policy))
    assert len(digests) == 5
    assert all(len(digest) == 16 for digest in digests)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "runs/x/policy", "../nowhere", "~/nowhere", ""])
def test_missing_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*; give a save_pretrained folder or a hub id"):
        causal_lm.locate(path)


def test_folder_is_itself(policy: Path) -> None:
    assert causal_lm.locate(str(policy)) == policy


def test_hub_id_is_downloaded_without_pickles(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(policy)

    monkeypatch.setattr(causal_lm, "snapshot_download", download)
    assert causal_lm.locate("org/some-model", "v1") == policy
    assert (asked["name"], asked["revision"]) == ("org/some-model", "v1")
    assert not any(pattern in asked["allow_patterns"] for pattern in ("*.bin", "*.py", "*"))
    assert causal_lm.locate("gpt2") == policy


def test_hub_failure_names_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("offline\nmore lines")

    monkeypatch.setattr(causal_lm, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"hub id org/name \(revision main\) .*offline\).*while online"):
        causal_lm.locate("org/name")


# Refusing


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        causal_lm.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_config(policy: Path) -> None:
    (policy / "config.json").unlink()
    refuse(policy, "no config.json; give a folder written by save_pretrained")


def test_no_weights(policy: Path) -> None:
    (policy / "model.safetensors").unlink()
    refuse(policy, r"no model\*.safetensors; give a folder with weights")


def test_pickle_weights_are_not_loaded(policy: Path) -> None:
    (policy / "model.safetensors").rename(policy / "pytorch_model.bin")
    refuse(policy, "only pickle weights .pytorch_model.bin., which are not loaded.*convert them")


def test_no_tokenizer(policy: Path) -> None:
    (policy / "tokenizer.json").unlink()
    refuse(policy, "no tokenizer; put one there with tokenizer.save_pretrained")


def test_damaged_tokenizer(policy: Path) -> None:
    (policy / "tokenizer.json").write_text('{"version": "1.0"}')
    refuse(policy, "the tokenizer cannot be read .*; write it again")


def test_damaged_config(policy: Path) -> None:
    (policy / "config.json").write_text('{"model_type": "llama",')
    refuse(policy, "; write it again with")


def test_unknown_architecture(policy: Path) -> None:
    config = json.loads((policy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (policy / "config.json").write_text(json.dumps(config))
    refuse(policy, "not a causal language model that transformers can read")
    assert not list(policy.glob("*.py"))


def test_damaged_weights(policy: Path) -> None:
    (policy / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    refuse(policy, "not a causal language model that transformers can read .*; write it again")


def test_missing_weights(policy: Path) -> None:
    weights = load_file(policy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, policy / "model.safetensors", metadata={"format": "pt"})
    refuse(policy, r"9 weights that config.json asks for are missing \(model.layers.1.*…\); take")


def test_weights_of_another_size(policy: Path) -> None:
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refuse(policy, "the weights do not match config.json .*; take both from the same")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision: must be auto, fp32 or bf16, got 'fp16'"),
        ({"device": "gpu"}, "device: 'gpu' is not a torch device"),
        ({"device": "cuda:99"}, "device: 'cuda:99' asked for, but .* found; use auto"),
    ],
)
def test_unknown_precision_and_device(saved: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        causal_lm.load(str(saved), **options)


# Encoding


def test_plain_text_is_encoded_as_the_tokenizer_does() -> None:
    tokenizer = tiny.byte_tokenizer()
    ids = causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "ab")))
    assert ids == tokenizer("ab")["input_ids"]
    assert ids[0] == 1
    assert ids.count(1) == 1


def test_an_end_token_that_the_tokenizer_adds_is_left_out() -> None:
    tokenizer = tiny.byte_tokenizer()
    plain = causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "ab")))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("ab")["input_ids"][-1] == 2
    assert causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "ab"))) == plain


def test_an_end_token_that_stands_in_the_prompt_stays() -> None:
    ids = causal_lm.encode_prompt(tiny.byte_tokenizer(), prompt_of((VERBATIM, "ab<eos>")))
    assert ids[-1] == 2


def test_an_empty_prompt_is_the_beginning_of_a_text() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert tokenizer("")["input_ids"] == []
    assert causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, ""))) == [1]
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"prompts.jsonl:7.*no tokens.*remove the prompt"):
        causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "")))


def test_chat_template_is_applied_once_with_one_beginning() -> None:
    tokenizer = tiny.byte_tokenizer()
    ids = causal_lm.encode_prompt(tokenizer, prompt_of(("system", "S"), ("user", "hi")))
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "<bos>[system]S[user]hi[assistant]"


def test_a_template_with_two_beginnings_gives_one() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = causal_lm.encode_prompt(tokenizer, prompt_of(("user", "hi")))
    assert tokenizer.decode(ids) == "<bos>[user]hi[assistant]"


def test_no_chat_template() -> None:
    with pytest.raises(DataError, match=r"no chat template; use plain-text prompts .*, or a tokenizer with a template"):
        causal_lm.encode_prompt(tiny.byte_tokenizer(chat=False), prompt_of(("user", "hi")))


def test_a_template_that_refuses() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"prompts.jsonl:7.*refuses its messages \(System role not supported\)"):
        causal_lm.encode_prompt(tokenizer, prompt_of(("system", "S"), ("user", "hi")))


# Completions


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the SentencePiece kind: the start of a text is marked like a space."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abcHelo,.", "He", "ll", "Hell", "Hello", "▁Hello", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)} | {f"<0x{i:02X}>": 100 + i for i in range(256)}
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny.byte_tokenizer, marking_tokenizer])
@pytest.mark.parametrize("text", ["Hello", " Hello", "  a", "a\n\nb", "\na", ", b c ", "é ünd 漢字", "🙂", ""])
@pytest.mark.parametrize("start", ["abc", "a ", "é", "a\n"])
def test_a_completion_comes_back_as_it_was(make, text: str, start: str) -> None:
    tokenizer = make()
    before = causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, start)))
    ids = causal_lm.encode_completion(tokenizer, text, stop=False)
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert causal_lm.decode_completion(tokenizer, before, ids) == text


def test_the_space_of_a_word_is_kept() -> None:
    tokenizer = marking_tokenizer()
    before = causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "a")))
    word = [tokenizer.convert_tokens_to_ids("▁Hello")]
    assert tokenizer.decode(word) == "Hello"
    assert causal_lm.decode_completion(tokenizer, before, word) == " Hello"
    assert causal_lm.encode_completion(tokenizer, " Hello", stop=False) == word


def test_an_unfinished_character_does_not_eat_text() -> None:
    tokenizer = tiny.byte_tokenizer()
    before = causal_lm.encode_prompt(tokenizer, prompt_of((VERBATIM, "x漢字")))
    ids = causal_lm.encode_completion(tokenizer, "ab漢", stop=False)
    assert causal_lm.decode_completion(tokenizer, before, ids[:-1]) == "ab\ufffd"


def test_special_tokens_are_left_out_and_the_end_is_added_on_request() -> None:
    tokenizer = tiny.byte_tokenizer()
    open_ids = causal_lm.encode_completion(tokenizer, "ab", stop=False)
    assert causal_lm.encode_completion(tokenizer, "ab", stop=True) == [*open_ids, 2]
    assert causal_lm.decode_completion(tokenizer, [1], [*open_ids, 2, 1]) == "ab"


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        causal_lm.encode_completion(tokenizer, "ab", stop=True)


# Export


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_plain_transformers_loads_what_is_exported(architecture: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(architecture, tiny.BYTE_VOCABULARY)
    causal_lm.export(model, tiny.byte_tokenizer(), tmp_path, "# Card\n")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("ab")["input_ids"] == tiny.byte_tokenizer()("ab")["input_ids"]
    assert tokenizer.chat_template == tiny.byte_tokenizer().chat_template
    assert (tmp_path / "README.md").read_text() == "# Card\n"
    lm = causal_lm.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, plain(ids).logits)


def test_export_is_quiet_deterministic_and_keeps_dtype(
    policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = causal_lm.load(str(policy), precision="bf16", cache=False)
    generation = GenerationConfig(eos_token_id=[2, 9], temperature=0.7, do_sample=True)
    for name in ("one", "two"):
        causal_lm.export(lm.model, lm.tokenizer, tmp_path / name, "card", generation)
    assert capfd.readouterr() == ("", "")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]
    assert {t.dtype for t in load_file(tmp_path / "one" / "model.safetensors").values()} == {torch.bfloat16}
    again = causal_lm.load(str(tmp_path / "one"), precision="bf16")
    assert again.stop_ids == {1, 2, 9}
    assert again.digest == causal_lm.folder_digest(tmp_path / "two")
