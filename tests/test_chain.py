"""Eq. 3-4: rendering, parsing and judging reasoning chains."""

import random
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from degrade import DEGRADATIONS, Degradation, canonical
from rr1.chain import (
    MAX_INSTANCES,
    SECTIONS,
    TAGS,
    Chain,
    build_prompt,
    build_question,
    is_well_formed,
    parse,
    render,
)

CHAIN = Chain(
    [("lens blur", 0.47), ("noise", 0.2)],
    "soft edges",
    "four cars in a row",
    "they are trucks",
    "0",
)
TEXT = (
    "<TYPE>lens blur(0.47), noise(0.20)<TYPE_END>\n"
    "<INFLUENCE>soft edges<INFLUENCE_END>\n"
    "<REASONING>four cars in a row<REASONING_END>\n"
    "<CONCLUSION>they are trucks<CONCLUSION_END>\n"
    "<ANSWER>0<ANSWER_END>"
)
REST = TEXT[TEXT.index("<INFLUENCE>") :]  # everything after the TYPE section

# The same examples in every run, and no verdict on how fast the machine is.
STEADY = dict(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---------------------------------------------------------------- the written form


def test_render_writes_eq_4():
    assert render(CHAIN) == TEXT
    assert parse(TEXT) == CHAIN and is_well_formed(TEXT)


def test_no_degradations_and_no_answer():
    chain = Chain([], "none", "r", "c")
    text = render(chain)
    assert text.startswith("<TYPE><TYPE_END>\n<INFLUENCE>none<") and "ANSWER" not in text
    assert parse(text) == chain and parse(text).answer is None and is_well_formed(text)


def test_none_is_left_out_and_empty_is_kept():
    chain = Chain([], None, "", "c")
    assert (
        render(chain)
        == "<TYPE><TYPE_END>\n<REASONING><REASONING_END>\n<CONCLUSION>c<CONCLUSION_END>"
    )
    assert parse(render(chain)) == chain
    assert not is_well_formed(render(chain))


def test_the_constructor_normalises():
    chain = Chain(
        [("Lens_Blur", 0.474), ("JPEG Compression", 1), ("  Fog\nbank ", 0.5)],
        " a\nb ",
        answer=2,
    )
    assert chain.degradations == [
        ("lens blur", 0.47),
        ("compression", 1.0),
        ("fog bank", 0.5),
    ]
    assert all(isinstance(instance, Degradation) for instance in chain.degradations)
    assert (chain.influence, chain.answer) == ("a\nb", "2")


@pytest.mark.parametrize("tag", TAGS)
def test_a_text_with_a_tag_is_refused(tag):
    with pytest.raises(ValueError, match=f"conclusion contains the tag {tag}"):
        Chain([], "a", "b", f"c{tag}d")


@pytest.mark.parametrize("name", ["", " ", "a(b", "a)b", "a,b"])
def test_a_type_name_that_could_not_be_read_back_is_refused(name):
    with pytest.raises(ValueError, match="type name"):
        Chain([(name, 0.5)])


@pytest.mark.parametrize("s", [float("nan"), float("inf"), float("-inf")])
def test_an_intensity_that_is_no_number_is_refused(s):
    with pytest.raises(ValueError, match="finite"):
        Chain([("noise", s)])


def test_too_many_degradations_are_refused_and_not_read():
    with pytest.raises(ValueError, match="at most"):
        Chain([("noise", 0.5)] * (MAX_INSTANCES + 1))
    many = ", ".join(["noise(0.50)"] * (MAX_INSTANCES + 1))
    assert len(parse(f"<TYPE>{many}<TYPE_END>").degradations) == MAX_INSTANCES
    assert not is_well_formed(f"<TYPE>{many}<TYPE_END>{REST}")


# ---------------------------------------------------------------- parse(render(c)) == c

texts = st.none() | st.text() | st.text(alphabet="<>_TYPEND (),.01\n\t")
numbers = (
    st.floats(0, 1) | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False)
)
known = st.sampled_from([*DEGRADATIONS, "JPEG compression", "gaussian_noise"])
names = known | st.text(min_size=1, max_size=20)


@st.composite
def chains(draw):
    parts = [
        draw(st.lists(st.tuples(names, numbers), max_size=6)),
        *(draw(texts) for _ in range(4)),
    ]
    try:
        return Chain(*parts)
    except ValueError:  # a tag in a text, a bracket in a name: shown above to be refused
        return Chain(
            [], *(part if part is None else part.replace("<", "") for part in parts[1:])
        )


@settings(max_examples=400, **STEADY)
@given(chains())
@example(
    Chain(
        [("noise", 1.004), ("noise", -0.001), ("noise", 1e300), ("x", 5e-324), ("y", -1e-7)]
    )
)
@example(
    Chain(
        [("\u0130\u03a3", 0.5), ("\u212aelvin", 0.995), ("<type>", 0.1)],
        "<TYPE_END",
        ">",
        "<",
        "<<ANSWER",
    )
)
@example(Chain([], "\x85\u2028a\x00", "\ud800", "\r\nb\r\nc", ""))
def test_parse_inverts_render(chain):
    assert parse(render(chain)) == chain


@settings(max_examples=100, **STEADY)
@given(
    st.lists(st.tuples(st.sampled_from([*DEGRADATIONS]), st.floats(0, 1))),
    st.text(alphabet="ab\n< .,()"),
)
def test_what_is_rendered_from_known_types_is_well_formed(degradations, text):
    assert is_well_formed(render(Chain(degradations, text, text, text)))
    assert is_well_formed(
        "  "
        + render(Chain(degradations, text, text, text, text)).replace("\n<", "<")
        + "\n"
    )


# ---------------------------------------------------------------- what models write


def test_aliases_in_any_case_with_underscores():
    written = (
        "JPEG_Compression(0.5), Block exchange (0.25) ,mean   shift(.1),Gaussian Noise( 1 )"
    )
    assert parse(f"<TYPE>{written}<TYPE_END>").degradations == [
        ("compression", 0.5), ("block change", 0.25), ("shifting", 0.1), ("noise", 1.0),
    ]  # fmt: skip
    assert is_well_formed(f"<TYPE>{written}<TYPE_END>{REST}")
    assert all(
        name == canonical(name)
        for name, _ in parse(f"<TYPE>{written}<TYPE_END>").degradations
    )


@pytest.mark.parametrize("number", ["1.5", "-0.2", "1.004", "-0.001", "100", "1e3"])
def test_a_number_outside_the_range_is_kept_and_reported(number):
    text = f"<TYPE>noise({number})<TYPE_END>{REST}"
    assert parse(text).degradations == [("noise", float(number))]
    assert not is_well_formed(text)


def test_an_unknown_type_is_kept_and_reported():
    text = f"<TYPE>Haze(0.30), noise(0.20)<TYPE_END>{REST}"
    assert parse(text).degradations == [("haze", 0.3), ("noise", 0.2)]
    assert not is_well_formed(text)


@pytest.mark.parametrize("body, kept", [
    ("noise", []), ("noise()", []), ("noise(high)", []), ("(0.5)", []), ("noise(nan)", []),
    ("noise(1e999)", []),
    ("noise(0,5)", []), ("noise(0.5", []), ("noise(0.5), lens bl", [("noise", 0.5)]),
    ("noise(0.5) lens blur(0.4)", [("noise", 0.5), ("lens blur", 0.4)]),
    ("noise(0.5),", [("noise", 0.5)]), ("noise((0.5))", []), ("noise(0.5%)", []), (",", []),
    ("noise, lens blur(0.4)", [("lens blur", 0.4)]),
    ("noise(\u0661)", []), ("noise(1_0)", []), ("noise(0.5)x", [("noise", 0.5)]),
])  # fmt: skip
def test_a_torn_type_section(body, kept):
    assert parse(f"<TYPE>{body}<TYPE_END>").degradations == kept
    assert not is_well_formed(f"<TYPE>{body}<TYPE_END>{REST}")


def test_every_section_can_be_missing():
    for missing, name in enumerate(SECTIONS):
        lines = TEXT.split("\n")
        del lines[missing]
        chain = parse("\n".join(lines))
        values = [
            chain.degradations or None,
            chain.influence,
            chain.reasoning,
            chain.conclusion,
            chain.answer,
        ]
        assert [value is None for value in values] == [i == missing for i in range(5)]
        assert is_well_formed("\n".join(lines)) == (name == "ANSWER")
    assert parse("") == Chain() and parse("the sky is blue") == Chain()
    assert not is_well_formed("") and not is_well_formed("the sky is blue")


def test_repeated_sections():
    for line in TEXT.split("\n"):
        again = TEXT.replace(line, line + "\n" + line)
        assert parse(again) == CHAIN and not is_well_formed(again)
    assert (
        parse("<ANSWER>0<ANSWER_END><ANSWER>1<ANSWER_END>").answer == "0"
    )  # the first counts
    assert parse("<ANSWER><ANSWER>1<ANSWER_END>").answer == "1"


def test_sections_out_of_order():
    lines = TEXT.split("\n")
    for i in range(5):
        for j in range(i):
            swapped = lines.copy()
            swapped[i], swapped[j] = swapped[j], swapped[i]
            assert parse("\n".join(swapped)) == CHAIN and not is_well_formed(
                "\n".join(swapped)
            )


def test_words_outside_the_sections():
    lines = TEXT.split("\n")
    for i in range(6):
        noisy = "\n".join([*lines[:i], "well,", *lines[i:]])
        assert parse(noisy) == CHAIN and not is_well_formed(noisy)


def test_a_section_inside_another_is_torn():
    text = "<INFLUENCE>a<REASONING>b<REASONING_END>c<INFLUENCE_END>"
    assert (parse(text).influence, parse(text).reasoning) == (None, "b")
    nested = TEXT.replace("soft edges", "soft <ANSWER> edges")
    assert parse(nested).influence is None and not is_well_formed(nested)


def test_every_prefix_of_a_chain_is_read():
    for cut in range(len(TEXT)):
        chain = parse(TEXT[:cut])
        closed = [name for name in SECTIONS if f"<{name}_END>" in TEXT[:cut]]
        assert (chain.answer is None) and (chain.conclusion is None) == (
            "CONCLUSION" not in closed
        )
        assert is_well_formed(TEXT[:cut]) == (
            TEXT[:cut].rstrip().endswith("<CONCLUSION_END>")
        )


# ---------------------------------------------------------------- anything at all, within 10 ms

SIZE = 100_000


def hostile_texts():
    rng = random.Random(0)
    soup = [
        *TAGS,
        "noise(0.2)",
        ", ",
        "(",
        ")",
        "<",
        ">",
        "\n",
        "lens blur",
        "0.5",
        "x" * 30,
    ]
    yield "random bytes", rng.randbytes(SIZE).decode("latin-1")
    yield "random bytes, UTF-8", rng.randbytes(SIZE).decode("utf-8", "replace")
    yield "random code points", "".join(chr(rng.randrange(0x110000)) for _ in range(SIZE))
    yield "tag soup", "".join(rng.choices(soup, k=SIZE // 8))[:SIZE]
    yield "a chain cut anywhere", (TEXT[: rng.randrange(len(TEXT))] * 1000)[:SIZE]
    yield (
        "long texts",
        render(Chain(CHAIN.degradations, "a " * 16_000, "b\n" * 16_000, "<" * 32_000)),
    )
    torn = ("<TYPE>", "<TYPE_END>", "<", "<TYPE", "<TYPE_END", " ", "<ANSWER><ANSWER_END>")
    for piece in (*torn, "<TYPE_END><TYPE>"):
        yield f"only {piece!r}", (piece * SIZE)[:SIZE]
    for piece in (
        *"(), a9",
        "()",
        "a(0),",
        "noise(0.20), ",
        "noise(",
        "0.2),",
        "(,)",
        "1e",
    ):
        yield (
            f"TYPE full of {piece!r}",
            "<TYPE>" + (piece * SIZE)[:SIZE] + "<TYPE_END>" + REST,
        )
        yield f"TYPE full of {piece!r}, open", "<TYPE>" + (piece * SIZE)[:SIZE]
    for inside in (
        "9" * SIZE,
        "9" * SIZE + "x",
        "0." + "0" * SIZE + "1",
        "1e" + "9" * SIZE,
        " " * SIZE,
    ):
        yield f"noise({inside[:4]}...)", f"<TYPE>noise({inside})<TYPE_END>{REST}"
    # all new, all near a known one
    invented = (f"watermark damage{rng.getrandbits(64):x}(0.5)" for _ in range(2500))
    yield "invented types", f"<TYPE>{', '.join(invented)}<TYPE_END>{REST}"


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=name) for name, text in hostile_texts()]
)
def test_any_text_within_10_ms(text):
    for function in (parse, is_well_formed):
        seconds = []
        for _ in range(3):  # the best of three: a busy machine is not the parser's fault
            start = time.perf_counter()
            function(text)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.010
    assert parse(render(parse(text))) == parse(text)


@settings(max_examples=300, **STEADY)
@given(
    st.lists(
        st.sampled_from([*TAGS, "noise(0.2)", "noise(2)", ",", "(", ")", "\n", "a"])
        | st.text(max_size=5)
    )
)
def test_parse_never_raises(pieces):
    chain = parse("".join(pieces))
    assert parse(render(chain)) == chain
    assert isinstance(is_well_formed("".join(pieces)), bool)


# ---------------------------------------------------------------- the prompt


def test_the_prompt_asks_for_the_sections_in_order():
    prompt = build_prompt("What are these?", ["trucks", "wagons", "jeeps", "cars"])
    question, choices, instruction = prompt.split("\n")
    assert (question, choices) == (
        "What are these?",
        "0. trucks 1. wagons 2. jeeps 3. cars",
    )
    places = [instruction.index(name) for name in SECTIONS]
    assert places == sorted(places) and len(instruction.split()) <= 12
    assert (
        build_question("What are these?", ["trucks", "wagons", "jeeps", "cars"])
        == f"{question}\n{choices}"
    )
    assert (
        build_prompt("What are these?")
        == f"{question}\n{instruction}"
        == build_prompt("What are these? ", [])
    )
