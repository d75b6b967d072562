"""Responses in two tokenizers; the tokenizers are real ones, trained here."""

import functools
import itertools
import json
import pickle

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from kd.align import (
    Alignment,
    Groups,
    TokenBytes,
    Unaligned,
    align,
    matched_vocabulary,
    teacher_response,
)
from kd.model.tiny import build_processor
from kd.types import UserError

CORPUS = [
    "The quick brown fox jumps over the lazy dog. A heading\n\nand 12345.67 apples, 3.14159!",
    "def distil(student, teacher):\n    return student - teacher  # 2024-01-02\n\t\tpass",
    "Größe, naïve café, façade; ça va? Straße; 東京都は日本の首都です。北京大学 中文",
    "emoji 😀😀🎉 👩‍👩‍👧 and flags 🇩🇪; e\u0301 combining o\u0308 and   runs     of spaces",
] * 4
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def wrap(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def byte_level(size: int, eos: str, **options: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", eos], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, eos_token=eos, pad_token="<pad>")


def trained_bpe(specials: list[str], replaced: bool) -> tuple[dict[str, int], list]:
    """Pieces and merges with ▁ for a space, and the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    if replaced:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [*specials, *BYTES, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    return {p: i for i, p in enumerate(pieces)}, [tuple(m) for m in model["merges"]]


def llama() -> LlamaTokenizer:
    vocab, merges = trained_bpe(["<unk>", "<s>", "</s>"], replaced=False)
    return LlamaTokenizer(vocab=vocab, merges=merges)


def gemma() -> GemmaTokenizer:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab, merges = trained_bpe(specials, replaced=True)
    return GemmaTokenizer(vocab=vocab, merges=merges)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=250, unk_token="<unk>", special_tokens=["<unk>"])
    )
    pieces = [tuple(x) for x in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer.model = models.Unigram(pieces + [(b, -20.0) for b in BYTES], 0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return wrap(tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, eos_token="[SEP]", unk_token="[UNK]")


MAKE = {
    "small_bytes": functools.partial(byte_level, 300, "<|im_end|>"),
    "large_bytes": functools.partial(byte_level, 600, "</s>", use_regex=False),
    "qwen": lambda: build_processor(CORPUS, vocab_size=400).tokenizer,
    "llama": llama,
    "gemma": gemma,
    "unigram": unigram,
    "word_piece": word_piece,
}
EXACT = [name for name in MAKE if name != "word_piece"]
PAIRS = [(a, b) for a in EXACT for b in EXACT]


@functools.cache
def side(name: str) -> TokenBytes:
    return TokenBytes(MAKE[name]())


def encode(name: str, text: str, *, ended: bool = True) -> list[int]:
    ids = side(name).tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, side(name).eos_id] if ended else ids


def spelt(name: str, ids: list[int]) -> list[bytes]:
    pieces = side(name).spell(side(name).split(ids)[0])
    assert not isinstance(pieces, Unaligned), pieces
    return pieces


def grouped(name: str, other: str, ids: list[int], other_ids: list[int]) -> Alignment:
    alignment = align(ids, other_ids, side(name), side(other))
    assert isinstance(alignment, Alignment), (alignment, ids, other_ids)
    return alignment


def assert_covers(alignment: Alignment, student_tokens: int, teacher_tokens: int) -> None:
    """Every token of both sides once and in order, none of the groups empty."""
    s = t = 0
    for student_start, student_len, teacher_start, teacher_len in alignment.groups:
        assert (student_start, teacher_start) == (s, t) and student_len > 0 and teacher_len > 0
        s, t = s + student_len, t + teacher_len
    assert (s, t) == (student_tokens, teacher_tokens)


MIXED = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\r\n", "12345.67", "007", "the lazy dog"]),
        st.sampled_from(
            ["😀", "👩‍👩‍👧", "🇩🇪", "東京都", "中文", "é", "e\u0301", "\u0308", "ß", "Ġ"]
        ),
    ),
    max_size=8,
).map("".join)


def is_kept(text: str) -> bool:
    """Qwen's tokenizer composes characters, and SentencePiece takes ▁ for a space."""
    return normalizers.NFC().normalize_str(text) == text and "▁" not in text


KEPT = MIXED.filter(is_kept)
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("name", EXACT)
@SETTINGS
@given(text=KEPT)
@example(text=" leading and trailing ")
@example(text="")
def test_the_bytes_of_the_tokens_are_those_of_the_text(name, text):
    pieces = spelt(name, encode(name, text))
    assert text.encode() in [b"".join(reading) for reading in side(name).readings(pieces)]


@pytest.mark.parametrize(("name", "other"), PAIRS)
@settings(SETTINGS, max_examples=25)
@given(text=KEPT, ended=st.booleans())
@example(text="The quick brown fox", ended=True)
@example(text=" a space first", ended=False)
@example(text="  two", ended=False)
@example(text="", ended=True)
def test_groups_cover_both_sides_and_spell_the_same(name, other, text, ended):
    ids, other_ids = encode(name, text, ended=ended), encode(other, text, ended=ended)
    alignment = align(ids, other_ids, side(name), side(other))
    if isinstance(alignment, Unaligned):
        # The space before a text is lost where the tokenizer takes it for its own.
        assert not text.strip() or text.startswith(" "), alignment
        assert side(name).free_spaces or side(other).free_spaces
        return
    assert_covers(alignment, len(ids), len(other_ids))
    pieces, other_pieces = spelt(name, ids), spelt(other, other_ids)
    for g, (s, s_len, t, t_len) in enumerate(alignment.groups[: len(alignment.groups) - ended]):
        ours, theirs = b"".join(pieces[s : s + s_len]), b"".join(other_pieces[t : t + t_len])
        assert ours == theirs or (g == 0 and ours.lstrip(b" ") == theirs.lstrip(b" "))
        # As small as can be: within a group no two tokens end together, but where nothing is spelt.
        inner = [
            set(itertools.accumulate(len(p) for p in part)) - {len(ours), len(theirs)}
            for part in (pieces[s : s + s_len], other_pieces[t : t + t_len])
        ]
        assert g == 0 or not (inner[0] & inner[1])
    if ended:
        assert alignment.groups[-1] == (len(ids) - 1, 1, len(other_ids) - 1, 1)


@pytest.mark.parametrize("name", EXACT)
@settings(SETTINGS, max_examples=25)
@given(text=KEPT.filter(lambda text: not text.startswith(" ")))
def test_one_tokenizer_gives_groups_of_one_token(name, text):
    """But for a token that is only the space put before the text, which joins the next."""
    ids = encode(name, text)
    groups = grouped(name, name, ids, ids).groups
    assert all(s == t and s_len == t_len for s, s_len, t, t_len in groups)
    lengths = [s_len for _, s_len, _, _ in groups]
    first = spelt(name, ids)[:1] == [b" "] and side(name).free_spaces and len(ids) > 2
    assert lengths[1:] == [1] * (len(lengths) - 1) and lengths[0] == (2 if first else 1)


@pytest.mark.parametrize(("name", "other"), PAIRS)
@settings(SETTINGS, max_examples=20)
@given(text=KEPT.filter(lambda text: not text.startswith(" ")), ended=st.booleans())
def test_the_teachers_side_of_a_sampled_response(name, other, text, ended):
    ids = encode(name, text, ended=ended)
    theirs = teacher_response(ids, side(name), side(other))
    assert theirs == encode(other, text, ended=ended)
    assert_covers(grouped(name, other, ids, theirs), len(ids), len(theirs))


@SETTINGS
@given(data=st.data())
def test_ids_that_no_tokenizer_would_choose_align_too(data):
    """A student samples what it likes: its ids need not be those that its text is split into."""
    name, other = data.draw(st.sampled_from(PAIRS))
    usable = [i for i, piece in enumerate(side(name).bytes_of) if piece]
    ids = data.draw(st.lists(st.sampled_from(usable), min_size=1, max_size=12))
    theirs = teacher_response(ids, side(name), side(other))
    spelled = b"".join(side(name).readings(spelt(name, ids))[0])
    try:
        text = spelled.decode()
    except UnicodeDecodeError:
        assert isinstance(theirs, Unaligned) and "UTF-8" in theirs.reason
        return
    assert isinstance(theirs, list)
    alignment = align(ids, theirs, side(name), side(other))
    if is_kept(text) and text.strip() and not text.startswith(" "):
        assert isinstance(alignment, Alignment), (alignment, text)
        assert_covers(alignment, len(ids), len(theirs))


def test_known_groups():
    """Worked out by hand: 'low' 'er' '!' against 'lo' 'wer' '!'."""
    sides = []
    for pieces in (["l", "o", "w", "e", "r", "!", "low", "er"], ["l", "o", "w", "er", "wer", "!"]):
        vocab = {p: i for i, p in enumerate([*pieces, "lo", "we", "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
        sides.append(TokenBytes(wrap(tokenizer, eos_token="</s>")))
    student, teacher = sides
    ours = [student.tokenizer.convert_tokens_to_ids(t) for t in ["low", "er", "!", "</s>"]]
    theirs = [teacher.tokenizer.convert_tokens_to_ids(t) for t in ["lo", "wer", "!", "</s>"]]
    expected = Alignment([(0, 2, 0, 2), (2, 1, 2, 1), (3, 1, 3, 1)])
    assert align(ours, theirs, student, teacher) == expected
    letters = [teacher.tokenizer.convert_tokens_to_ids(t) for t in ["lo", "w", "er", "!", "</s>"]]
    expected = Alignment([(0, 1, 0, 2), (1, 1, 2, 1), (2, 1, 3, 1), (3, 1, 4, 1)])
    assert align(ours, letters, student, teacher) == expected


@pytest.mark.parametrize("name", EXACT)
@settings(SETTINGS, max_examples=25)
@given(text=st.text("The quick brown FOX, 123 Größe\n\t\u00a0é😀", min_size=1, max_size=30))
def test_word_piece_meets_the_others_without_whitespace(name, text):
    for ours, theirs in ((name, "word_piece"), ("word_piece", name)):
        ids, other_ids = encode(ours, text), encode(theirs, text)
        alignment = align(ids, other_ids, side(ours), side(theirs))
        unknown = side("word_piece").tokenizer.unk_token_id in encode("word_piece", text)
        if isinstance(alignment, Unaligned):
            assert unknown or not text.strip()
        else:
            assert_covers(alignment, len(ids), len(other_ids))
            assert not unknown


def test_word_piece_groups_are_words():
    ids, other_ids = encode("word_piece", "The  Größe\n"), encode("gemma", "The  Größe\n")
    ends = set()
    for s, s_len, _, _ in grouped("word_piece", "gemma", ids, other_ids).groups[:-1]:
        ends.add("".join(side("word_piece").tokenizer.convert_ids_to_tokens(ids[: s + s_len])))
    assert "the" in ends


def test_what_cannot_be_aligned_says_why():
    def reason(ids: list[int], other_ids: list[int], name: str = "qwen") -> str:
        found = align(ids, other_ids, side(name), side("gemma"))
        assert isinstance(found, Unaligned)
        return found.reason

    ids, theirs = encode("qwen", "fox"), encode("gemma", "fox")
    assert reason(ids[:-1], theirs) == reason(ids, theirs[:-1])
    assert "end" in reason(ids, theirs[:-1])
    assert "differently" in reason(ids, encode("gemma", "fix"))
    pad = side("qwen").tokenizer.pad_token_id
    assert "<|endoftext|>" in reason([pad, *ids], theirs)
    assert "spells nothing" in reason([10**6, *ids], theirs)
    unknown = encode("word_piece", "\u16a0", ended=True)
    assert "[UNK]" in reason(unknown, encode("gemma", "\u16a0"), "word_piece")


@pytest.mark.parametrize(("name", "text"), [("qwen", "e\u0301"), ("gemma", "a▁b")])
def test_a_text_that_a_tokenizer_changes_is_not_aligned(name, text):
    ids = encode("small_bytes", text)
    theirs = teacher_response(ids, side("small_bytes"), side(name))
    assert isinstance(theirs, list)
    found = align(ids, theirs, side("small_bytes"), side(name))
    assert isinstance(found, Unaligned) and "differently" in found.reason


def test_a_response_cut_within_a_character_is_named():
    ids = encode("small_bytes", "fox 🦊", ended=False)
    assert isinstance(teacher_response(ids, side("small_bytes"), side("gemma")), list)
    cut = teacher_response(ids[:-1], side("small_bytes"), side("gemma"))
    assert isinstance(cut, Unaligned) and "half a character" in cut.reason


def test_any_stop_id_ends_a_response_with_the_teachers_eos():
    tokenizer = side("qwen").tokenizer
    stops = TokenBytes(tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    ids = [*encode("qwen", "the dog", ended=False), tokenizer.pad_token_id]
    theirs = teacher_response(ids, stops, side("gemma"))
    assert theirs == encode("gemma", "the dog")
    found = align(ids, theirs, stops, side("gemma"))
    assert isinstance(found, Alignment)
    assert found.groups[-1] == (len(ids) - 1, 1, len(theirs) - 1, 1)
    assert teacher_response([stops.eos_id], stops, side("gemma")) == [side("gemma").eos_id]
    assert align([], [], stops, side("gemma")) == Alignment([])


@pytest.mark.parametrize(("name", "other"), [*PAIRS, ("gemma", "word_piece")])
def test_matched_tokens_spell_the_same_and_are_matched_once(name, other):
    ours_K, theirs_K = (ids.tolist() for ids in matched_vocabulary(side(name), side(other)))
    assert len(set(ours_K)) == len(set(theirs_K)) == len(ours_K) > 50
    pairs = dict(zip(ours_K, theirs_K, strict=True))
    assert pairs.pop(side(name).eos_id) == side(other).eos_id
    for i, k in pairs.items():
        ours, theirs = side(name).bytes_of[i], side(other).bytes_of[k]
        assert ours == theirs and (ours or side(name).specials[i] == side(other).specials[k])
    shared = {p for p in side(name).bytes_of if p} & {p for p in side(other).bytes_of if p}
    assert shared == {side(name).bytes_of[i] for i in pairs if side(name).bytes_of[i]}


def test_a_piece_is_matched_rather_than_its_byte():
    ours_K, theirs_K = matched_vocabulary(side("gemma"), side("small_bytes"))
    a = side("gemma").tokenizer.convert_tokens_to_ids("a")
    assert a in ours_K and side("gemma").bytes_of[a] == b"a"
    assert side("gemma").tokenizer.convert_tokens_to_ids("<0x61>") not in ours_K
    theirs = dict(zip(ours_K.tolist(), theirs_K.tolist(), strict=True))[a]
    assert side("small_bytes").tokenizer.convert_ids_to_tokens(theirs) == "a"


def test_tokenizers_of_another_kind_are_refused():
    tokenizer = Tokenizer(models.BPE(vocab={"a</w>": 0, "<e>": 1}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(UserError, match="has the decoder BPEDecoder: responses"):
        TokenBytes(wrap(tokenizer, eos_token="<e>"))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(UserError, match="no EOS"):
        TokenBytes(wrap(tokenizer))


def test_a_worker_process_can_be_sent_it():
    copy = pickle.loads(pickle.dumps(side("word_piece")))
    assert copy.bytes_of == side("word_piece").bytes_of and copy.fold("É") == "e"


@SETTINGS
@given(data=st.data())
def test_chunks_hold_whole_groups_and_every_row(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=12))
    alone = data.draw(st.integers(0, 3))  # rows of a response that could not be aligned
    groups, s, t = [], 0, 0
    for s_len, t_len in lengths:
        groups.append((s, s_len, t, t_len))
        s, t = s + s_len, t + t_len
    joined = Groups.join(
        [[1] * s, [2] * alone, [3] * s],
        [[4] * t, [], [5] * t],
        [Alignment(groups), Alignment([]), Alignment(groups)],
    )
    assert joined.num_groups == 2 * len(groups) and joined.num_student_rows == 2 * s
    assert joined.counts([s, 0, alone, s]) == [len(groups), 0, 0, len(groups)]
    for max_rows in (1, 2, 5, 100):
        chunks = joined.chunks(max_rows)
        covered = [r for rows in chunks for r in range(rows.start, rows.stop)]
        assert covered == list(range(2 * s + alone))
        seen = 0
        for rows in chunks:
            within, teacher = joined.within(rows)
            assert within.start == seen
            seen = within.stop
            spans = joined.spans[within]
            longest = max((max(k, m) for _, k, _, m in spans), default=1)
            assert rows.stop - rows.start <= max(max_rows, longest)
            assert teacher.stop - teacher.start == sum(m for _, _, _, m in spans)
        assert seen == joined.num_groups
