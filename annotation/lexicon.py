"""Words of visual description in medicine: spellings, plurals, equivalents, opposites, and what no image shows.

Only true equivalents are listed. A wrong one would join two findings under one name; a missing one leaves two names,
which text embeddings may still join. All words below the spellings stand in American spelling and the singular.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"(?<=[lmd])our(?=$|s|ed|ing|less|ation)", "or"),
    (r"(?<=.)aem", "em"),
    (r"oedem", "edem"),
    (r"^oeso", "eso"),
    (r"rrhoe", "rrhe"),
    (r"pnoea", "pnea"),
    (r"^foet", "fet"),
    (r"^(c|f)aec", r"\1ec"),
    (r"^paed", "ped"),
    (r"^naev", "nev"),
    (r"^leuco", "leuko"),
    (r"grey", "gray"),
    (r"fibre", "fiber"),
    (r"calibre", "caliber"),
    (r"centred", "centered"),
    (r"centre", "center"),
    (r"artefact", "artifact"),
    (r"sulph", "sulf"),
    (r"mould", "mold"),
    (r"(?<=[lrtn])is(?=ed$|ation$)", "iz"),
    (r"^disk", "disc"),
)
"""British spellings as regular expressions, and the American ones, for one word in lower case."""

PLURALS: dict[str, str] = {
    **dict.fromkeys(("apexes", "apices"), "apex"),
    "alveoli": "alveolus",
    "anastomoses": "anastomosis",
    "appendices": "appendix",
    "atria": "atrium",
    "axes": "axis",
    "bacilli": "bacillus",
    "bacteria": "bacterium",
    "bases": "base",
    "bronchi": "bronchus",
    "calculi": "calculus",
    "calyces": "calyx",
    "cilia": "cilium",
    "cocci": "coccus",
    "comedones": "comedo",
    "corpora": "corpus",
    "cortices": "cortex",
    "criteria": "criterion",
    "diverticula": "diverticulum",
    "ecchymoses": "ecchymosis",
    "emboli": "embolus",
    "epithelia": "epithelium",
    "feet": "foot",
    "foci": "focus",
    "foramina": "foramen",
    "fungi": "fungus",
    "ganglia": "ganglion",
    "gyri": "gyrus",
    "halves": "half",
    "hila": "hilum",
    "hili": "hilum",
    "hyphae": "hypha",
    "keratoses": "keratosis",
    "leaves": "leaf",
    "lenses": "lens",
    "lumina": "lumen",
    "matrices": "matrix",
    "menisci": "meniscus",
    "metastases": "metastasis",
    "mitochondria": "mitochondrion",
    "mitoses": "mitosis",
    "necroses": "necrosis",
    **dict.fromkeys(("nevi", "naevi"), "nevus"),
    "nuclei": "nucleus",
    "nucleoli": "nucleolus",
    "ostia": "ostium",
    "petechiae": "petechia",
    "phalanges": "phalanx",
    "pseudopodia": "pseudopodium",
    "radii": "radius",
    "septa": "septum",
    "stenoses": "stenosis",
    "stigmata": "stigma",
    "stimuli": "stimulus",
    "strata": "stratum",
    "sulci": "sulcus",
    "teeth": "tooth",
    "telangiectases": "telangiectasia",
    "thrombi": "thrombus",
    "vertices": "vertex",
    "villi": "villus",
}
"""Plurals that no rule makes."""

SINGULAR_IN_S = _words(
    """
    always ascites atlas bias caries diabetes gas herpes lens pancreas perhaps rabies scabies series species yes
    """
)
"""Words in `s` that are no plurals; those in -ss, -us and -is need no list."""

EQUIVALENTS: dict[str, str] = {
    # Colour and tone
    **{f"{stem}ish": colour for stem, colour in {
        "redd": "red", "blu": "blue", "brown": "brown", "black": "black", "whit": "white", "gray": "gray",
        "yellow": "yellow", "green": "green", "purpl": "purple", "pink": "pink", "orang": "orange",
    }.items()},
    "violet": "purple",
    "multi colored": "multicolored",
    "multicolor": "multicolored",
    "multi color": "multicolored",
    # Size, number, side
    "big": "large",
    "broad": "wide",
    "many": "multiple",
    "numerous": "multiple",
    "solitary": "single",
    "one sided": "unilateral",
    "both sided": "bilateral",
    # Shape and border
    "circular": "round",
    "rounded": "round",
    "ovoid": "oval",
    "elliptic": "oval",
    "elliptical": "oval",
    "asymmetrical": "asymmetric",
    "symmetrical": "symmetric",
    **dict.fromkeys(("margin", "edge", "outline", "contour", "boundary"), "border"),
    **dict.fromkeys(
        (
            "indistinct", "poorly defined", "poorly demarcated", "poorly circumscribed", "poorly delineated",
            "ill demarcated", "ill circumscribed", "ill delineated", "vaguely defined",
        ),
        "ill defined",
    ),
    **dict.fromkeys(
        (
            "well demarcated", "well circumscribed", "well delineated", "sharply demarcated", "sharply circumscribed",
            "sharply defined", "clearly defined", "clearly demarcated",
        ),
        "well defined",
    ),
    "blurry": "blurred",
    "fuzzy": "blurred",
    # Texture and density
    "grainy": "granular",
    "inhomogeneous": "heterogeneous",
    "nonhomogeneous": "heterogeneous",
    "opacification": "opacity",
    "ggo": "ground glass opacity",
    "groundglass": "ground glass",
    "dilatation": "dilation",
    # Places and parts, as they stand before a noun
    "region": "area",
    "nuclear": "nucleus",
    "cytoplasmic": "cytoplasm",
    "nucleolar": "nucleolus",
}  # fmt: skip
"""Words and phrases → the one that stands for them."""

NOUNS_OF_QUALITIES: dict[str, str] = {
    "asymmetry": "asymmetric",
    "blurring": "blurred",
    "brightness": "bright",
    "dilation": "dilated",
    "elongation": "elongated",
    "enlargement": "enlarged",
    "granularity": "granular",
    "heterogeneity": "heterogeneous",
    "homogeneity": "homogeneous",
    "irregularity": "irregular",
    "narrowing": "narrowed",
    "pallor": "pale",
    "paleness": "pale",
    "redness": "red",
    "regularity": "regular",
    "roughness": "rough",
    "roundness": "round",
    "smoothness": "smooth",
    "symmetry": "symmetric",
    "thickening": "thickened",
    "thinning": "thinned",
}
"""Nouns that say of another noun what an adjective says: `border irregularity` is `irregular border`."""

QUALITIES: dict[str, frozenset[str]] = {
    "color": _words("red orange yellow green blue purple pink brown black white gray tan golden"),
    "tone": _words("dark light pale bright faint"),
    "size": _words("large medium small tiny giant huge enlarged"),
    "shape": _words("round oval square rectangular triangular linear elongated"),
    "texture": _words("smooth rough jagged granular"),
    "regularity": _words("regular irregular"),
    "symmetry": _words("symmetric asymmetric"),
    "homogeneity": _words("homogeneous heterogeneous"),
    "number": _words("single double multiple few"),
    "thickness": _words("thick thin thickened thinned"),
    "length": _words("long short"),
    "width": _words("wide narrow dilated narrowed"),
    "density": _words("dense sparse"),
    "grain": _words("fine coarse"),
    "sharpness": _words("sharp blurred"),
    "side": _words("left right unilateral bilateral"),
    "relief": _words("raised flat depressed sunken"),
    "gloss": _words("shiny dull"),
    "transparency": _words("transparent translucent opaque"),
    "spread": _words("focal localized diffuse generalized"),
}
"""Adjectives that may stand before a noun in any order, by the quality of which one of them holds."""

NOUNS_AFTER_A_QUALITY: dict[str, frozenset[str]] = {
    "color": frozenset({"color", "colored", "coloration", "hue"}),
    "tone": frozenset({"color", "colored", "coloration", "tone", "toned"}),
    "shape": frozenset({"shape", "shaped", "form"}),
    "size": frozenset({"size", "sized"}),
    "texture": frozenset({"texture", "textured"}),
}
"""Words that add nothing behind an adjective of a quality: `round shape` is `round`."""

OPPOSITES: tuple[tuple[frozenset[str], ...], ...] = tuple(
    tuple(frozenset(side.split()) for side in sides.split("|"))
    for sides in (
        "red|orange|yellow golden|green|blue|purple|pink|brown tan|black|white|gray",
        "dark|light pale bright faint",
        "large giant huge enlarged|medium|small tiny",
        "round|oval|square|rectangular|triangular|linear",
        "smooth|rough jagged",
        "regular|irregular",
        "symmetric|asymmetric",
        "homogeneous uniform even|heterogeneous variegated patchy mottled uneven",
        "single|double|multiple|few",
        "thick thickened|thin thinned",
        "long|short",
        "wide dilated|narrow narrowed",
        "dense|sparse",
        "fine|coarse",
        "well sharp|ill blurred",
        "left|right|bilateral|unilateral",
        "raised elevated|flat|depressed sunken",
        "shiny|dull",
        "transparent|translucent|opaque",
        "focal localized|diffuse generalized",
        "high|low",
        "increased|decreased reduced",
        "upper top superior|middle|lower bottom inferior",
        "above|below",
        "apical apex|basal base",
        "central center|peripheral periphery border",
        "inner internal inside|outer external outside",
        "superficial|deep",
        "anterior|posterior",
        "medial|lateral",
        "proximal|distal",
        "dorsal|ventral",
        "horizontal|vertical",
        "parallel|perpendicular",
        "convex|concave",
        "straight|curved",
        "open|closed",
        "solid|cystic hollow",
        "full|empty",
        "wet|dry",
        "hard|soft",
        "partial|complete",
        "clustered|scattered",
        "connected|separate",
        "present|absent",
        "with|without",
        "early|late",
        "acute|chronic",
        "typical|atypical",
        "normal|abnormal",
        "first|second|third",
        "one|two|three|four|five|six|seven|eight|nine|ten",
        "more|less fewer",
        "larger|smaller",
        "darker|lighter brighter paler",
        "longer|shorter",
        "thicker|thinner",
        "wider|narrower",
        "higher|lower",
    )
)
"""Words on different sides exclude each other; text embeddings put most of them close together."""

NEGATING_PREFIXES = ("non", "un", "in", "im", "ir", "il", "a", "an", "dis")
"""`segmented` and `unsegmented` are opposites."""

OPPOSED_PREFIXES: tuple[tuple[str, ...], ...] = (
    ("hyper", "hypo", "iso", "normo"),
    ("macro", "micro"),
    ("mono", "uni", "bi", "multi", "poly", "oligo"),
    ("intra", "extra", "inter"),
    ("endo", "exo"),
    ("supra", "infra"),
    ("over", "under"),
)
"""`hyperpigmented` and `hypopigmented` are opposites."""

RELATIONS = _words(
    """
    of with without in on at around near between among within inside outside under over above below along from to by
    into through than for like as or not no that which
    """
)
"""Words between two things; which thing stands where matters then."""

NOT_VISUAL = frozenset(
    {
        *_words(
            """
            age sex gender male female man woman ethnicity patient history symptom complaint pain painful tender
            tenderness itch itching itchy pruritus pruritic fever cough dyspnea fatigue nausea vomiting headache smoker
            smoking genetic gene mutation diagnosis prognosis treatment therapy medication drug allergy laboratory lab
            crp pcr antibody hormone palpable palpation smell odor
            """
        ),
        "biopsy result",
        "blood pressure",
        "blood test",
        "body temperature",
        "clinical course",
        "d dimer",
        "duration of",
        "heart rate",
        "serum level",
        "white blood cell count",
    }
)
"""Words and phrases that name nothing one can see in an image."""

VISUAL_ALL_THE_SAME = frozenset({"age spot", "sex chromatin", "male pattern", "female pattern"})
"""Visible things whose names hold one of those words."""
