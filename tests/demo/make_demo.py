"""Write the demo shop: tests/demo/items.jsonl and tests/demo/interactions.jsonl, always the same bytes.

Catalogue. SHOP below lists departments (#, with their brands), projects (@) and product types in the order a
project needs them. Each type gets seven to nine items. An item has a brand of the department, a fit
(1/2 in, 18V, M6) if its type has one (*), a variant and a pack; title and description name them all.

Users. Each user has a hidden current project and hidden loyalties: a brand per department and a
fit per project (or none, with probability NO_LOYALTY). Each purchase is drawn in three steps:
  1. Project. The user changes it with probability SWITCH, or DONE_SWITCH once all its types are bought. Half
     of the changes stay in the department.
  2. Product type. With probability NOISE it is any type, by popularity. Otherwise, if consumables (+) were
     bought, it is one of them again with probability REBUY, most likely a recent one. Otherwise it is a type
     of the project: from the one bought last, skipping j types has weight SKIP**j, going back BACK, and
     buying a type again AGAIN.
  3. Item of that type. A consumable that was bought before is the very same item with probability SAME.
     Otherwise the weight of an item is its Zipf popularity within the type, times BRAND if the brand is the
     user's, times FIT if the fit is.
New arrivals are on sale only in the final quarter, in which each user makes the last purchase and no other.
Step 3 then includes them, with weight ARRIVAL. A few are never bought.

Oracle. The exact distribution of the last purchase, given the history and the process but not the hidden
states. Steps 1 and 2 depend only on the project, step 3 only on type and loyalties. So the posterior is a
product: a forward filter over projects, and for each department one table over brand x the fits of its
projects. The oracle sees the whole history, not only the last ten items. It knows which items are new and
what they weigh. No recommender does better in expectation.

Example, from the project's root (about 7 s on one core; also prints a table of the oracle's figures)
  python tests/demo/make_demo.py
"""
import argparse
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenize_items import make_parser, write_jsonl  # noqa: E402

# ---- The parameters of the process ---------------------------------------------------------------

SEED = 7
NUM_USERS, MIN_LENGTH, MAX_LENGTH, MORE = 2500, 4, 15, 0.67  # length: 4, one more with probability MORE, ...
PER_TYPE, NUM_ARRIVALS, ARRIVAL = 8, 38, 0.8
SWITCH, DONE_SWITCH = 0.08, 0.9  # probabilities and weights: see the docstring
NOISE, REBUY, SAME = 0.1, 0.1, 0.5
SKIP, BACK, AGAIN = 0.65, 0.1, 0.02
ZIPF, BRAND, FIT, NO_LOYALTY = 0.4, 6.0, 8.0, 0.15
FIRST_DAY, LAST_QUARTER, END = 1672531200, 1727740800, 1735689600  # 2023-01-01, 2024-10-01, 2025-01-01, UTC

# ---- The shop ------------------------------------------------------------------------------------
# # department | brands | tip   @ section | doing what | fits | what the fit is a fit of
# Types: name|what it is there to do|variants|packs   * comes in fits, + consumable, = type listed elsewhere

SHOP = """
# Garden | Verdanto, Fernhollow, Rillbrook, Sodwyn, Thistlewick | Store out of the frost.
@ Irrigation | installing a drip watering system | 1/4 in, 1/2 in, 3/4 in | drip lines
*Drip Tubing|run water along a planting bed|polyethylene, flexible vinyl, soft rubber|50 ft coil, 100 ft coil
*Barbed Tee Connectors|branch a drip line off to a second row|brass, black nylon|pack of 10, pack of 25
*+Drip Emitters|give each plant a steady trickle at the root|adjustable, self-flushing|pack of 20, pack of 50
*Pressure Regulator|hold the water pressure where drippers like it|brass, inline|single unit, twin pack
*Line Filter|keep grit out of the emitters|stainless steel, mesh-screen|single unit, twin pack
*Watering Timer|turn the water on and off on a schedule|two-zone, single-zone, solar|single unit, gift box
@ Raised Beds | growing vegetables in raised beds | 2 x 4 ft, 4 x 4 ft, 3 x 6 ft | raised beds
*Raised Bed Kit|put up a planting bed without digging|galvanized, cedar, composite|one-bed box, two-bed set
=Deck Screws
*Bed Liner|keep soil in and weeds out of a planting bed|woven fabric, felt|single sheet, twin pack
+Potting Soil|fill beds and planters with a rich mix|peat-free, organic, coir-based|1 cu ft bag, 2 cu ft bag
+Vegetable Seeds|start a kitchen garden from seed|heirloom, early-season, salad-mix|pack of 6, tin of 12
+Tomato Feed|feed fruiting plants through the summer|organic, slow-release|3 lb bag, 1 qt bottle
*Row Cover|shield young plants from frost and insects|lightweight, heavyweight|single sheet, kit with hoops
@ Lawn Care | renovating a tired lawn | Fescue, Bermuda, Bluegrass | lawns
*+Grass Seed|fill bare patches and thicken thin turf|drought-tolerant, shade-tolerant|5 lb bag, 20 lb bag
*Starter Fertilizer|help new grass root quickly|granular, liquid|15 lb bag, 1 gal jug
*+Weed Control|clear broadleaf weeds and spare the grass|concentrate, ready-mixed|32 oz bottle, 1 gal jug
+Top Dressing|level bumps and improve the soil under turf|screened-sand, compost|40 lb bag, 2 cu ft bag
Broadcast Spreader|spread seed and granules evenly|handheld, push|single unit, kit with cover
Oscillating Sprinkler|water a freshly seeded area gently|metal-base, adjustable|single unit, twin pack
# Flooring & Tile | Grantello, Plankarra, Stonevik, Florrimo, Tessarine | Order ten percent extra for waste.
@ Tiling | laying a tile floor | 12 in, 18 in, 24 in | tiles
*Floor Tile|give kitchens and baths a tough floor|matte porcelain, glazed ceramic, slate|box of 10, box of 16
*+Thinset Mortar|bond tile to concrete or backer board|polymer-modified, rapid-setting|25 lb bag, 50 lb bag
*Notched Trowel|comb the adhesive to an even depth|stainless steel, soft-grip|single unit, set of 2
*+Tile Spacers|keep every joint the same width|reusable, tapered|bag of 100, bag of 250
*Leveling Clips|hold edges flush while the mortar sets|reusable, screw-cap|bag of 100, kit with pliers
+Tile Grout|fill the joints with a crack-resistant finish|light gray, charcoal, ivory|10 lb bag, 25 lb bag
Grout Sealer|keep stains and water out of the joints|penetrating, spray-on|16 oz bottle, 1 qt bottle
@ Laminate | fitting a floating laminate floor | 8 mm, 10 mm, 12 mm | laminate planks
*Laminate Planks|cover a room with click-together boards|oak-look, walnut-look, ash-look|box of 8, box of 12
*Underlayment|soften footsteps and even out the subfloor|cork, foam, felt|100 sq ft roll, 200 sq ft roll
*Plank Fitting Kit|tap boards tight without bruising the edges|hardwood, steel-bar|15-piece kit, 40-piece kit
*Transition Strip|bridge the gap where two floors meet|aluminum, oak-look|36 in length, 72 in length
*Quarter Round Trim|hide the expansion gap along the wall|primed, oak-look|pack of 4, pack of 8
+Laminate Cleaner|lift dirt without leaving streaks|ready-to-use, concentrate|32 oz bottle, 1 gal jug
# Paint & Finishes | Huemont, Brushwyck, Cobaltine, Larkfinish, Pelorra | Test on a hidden spot first.
@ Interior Painting | repainting a room | matte, eggshell, satin | wall finishes
Spackling Paste|fill nail holes and hairline cracks|lightweight, fast-drying|8 oz tub, 1 qt tub
+Painter's Tape|mask trim and glass for a crisp edge|multi-surface, delicate-surface|single roll, pack of 3
Drop Cloth|protect floors and furniture from splashes|canvas, plastic-backed|9 x 12 ft sheet, pack of 2
*Primer|seal the wall and block old stains|stain-blocking, low-odor|1 qt can, 1 gal can
*+Wall Paint|give walls an even, washable color|warm white, sage green, slate blue|1 gal can, 5 gal bucket
*+Roller Covers|lay down paint without lint or drips|microfiber, woven|pack of 3, pack of 6
*Angled Brush|cut in along ceilings and corners|nylon, short-handle|single unit, set of 3
@ Deck Care | restoring a weathered deck | cedar, pine, redwood | decks
*Deck Cleaner|wash away gray fibers and mildew|oxygen-based, concentrate|1 gal jug, 2 lb tub
*Wood Brightener|bring back the fresh-cut color of boards|gel, concentrate|1 qt bottle, 1 gal jug
Deck Screws|refasten loose boards for good|stainless steel, coated|box of 100, box of 350
+Sandpaper Sheets|smooth rough boards between coats|80-grit, 120-grit, assorted-grit|pack of 10, pack of 25
*+Deck Stain|color boards and shield them from sun and rain|semi-transparent, solid|1 gal can, 5 gal bucket
Stain Pad|work stain into the grain and between boards|lambswool, foam|single unit, kit with pole
*+Water Repellent|make rain bead up on the surface|clear, tinted|1 gal can, 5 gal bucket
# Workshop | Torvek, Hexmoor, Gritstead, Boltrane, Kelvarn | Wear eye protection.
@ Cordless Tools | building up a cordless tool kit | 12V, 18V, 36V | cordless tools
*Drill Driver|bore holes and drive screws in one go|brushless, compact|bare tool, kit with case
*Battery Pack|power every tool on the same platform|2 Ah, 4 Ah, 6 Ah|single unit, twin pack
*Fast Charger|bring an empty battery back within the hour|dual-port, wall-mount|single unit, kit with cable
*Impact Driver|sink long fasteners without stripping the heads|brushless, three-speed|bare tool, kit with case
*Circular Saw|rip sheet goods and crosscut lumber|brushless, left-blade|bare tool, kit with blade
*Work Light|throw bright light into dark corners|folding, magnetic|bare tool, kit with stand
+Drill Bits|cut clean holes in wood and metal|cobalt, titanium-coated|set of 15, set of 29
@ Fasteners | bolting together a shop bench | M5, M6, M8 | metric threads
*+Hex Bolts|join frames with a strong through-bolt|stainless steel, zinc-plated|box of 50, box of 100
*+Lock Nuts|stay tight under vibration|nylon-insert, stainless steel|box of 50, box of 100
*+Flat Washers|spread the load under a bolt head|stainless steel, zinc-plated|bag of 100, bag of 250
*Threaded Inserts|put strong machine threads into wood|brass, steel|pack of 25, pack of 50
*Tap and Drill Set|cut new threads or clean up old ones|cobalt, high-speed steel|set of 2, set of 5
=Drill Bits
+Threadlocker|keep screws from working loose|medium-strength, removable|10 ml bottle, 50 ml bottle
# Plumbing & Lighting | Aquavorn, Lumerix, Copperlyn, Fluxholm, Wattmere | Turn off the supply first.
@ PEX Piping | replacing the water lines in a house | 3/8 in, 1/2 in, 1 in | PEX pipe
*PEX Pipe|carry hot or cold water through walls and floors|red, blue, white|50 ft coil, 100 ft coil
*+Crimp Rings|lock a pipe onto its fitting|copper, stainless steel|bag of 25, bag of 50
*Elbow Fittings|turn a corner with a tight joint|brass, polymer|bag of 5, bag of 10
*Crimp Tool|squeeze rings to the right diameter every time|long-handle, compact|single unit, kit with gauge
*Ball Valve|shut off one branch of the supply|brass, full-port|single unit, pack of 5
*Pipe Insulation|stop heat loss and sweating pipes|foam, rubber|24 ft pack, 48 ft pack
@ LED Lighting | fitting LED light under cabinets | 5V, 12V, 24V | LED strips
*LED Strip|light a worktop or shelf evenly|warm white, cool white, color-changing|16 ft reel, 32 ft reel
*LED Power Supply|feed light strips from a wall outlet|slim, waterproof|single unit, twin pack
*Strip Connectors|join light strips without solder|two-pin, four-pin|pack of 10, pack of 20
Diffuser Channel|hide the diodes behind a soft glow|aluminum, corner|pack of 5, pack of 10
*Dimmer Switch|set the brightness to the mood|remote, touch|single unit, twin pack
*Motion Sensor|turn lights on when a hand comes near|infrared, door-activated|single unit, twin pack
# Kitchen | Crumbhaven, Panquilla, Brewmond, Saltwick, Doughlin | A good gift for a keen cook.
@ Bread Baking | baking sourdough at home | 500 g, 750 g, 1 kg | loaves
+Bread Flour|build a strong, elastic dough|organic, stone-ground, whole-wheat|5 lb bag, 10 lb bag
*Proofing Basket|shape dough during its last rise|rattan, wood-pulp|single unit, kit with liner
*Proofing Cloth|keep rising dough from sticking|linen, cotton|single unit, pack of 2
Bread Lame|score the crust with a clean cut|walnut, stainless steel|single unit, kit with blades
*Bread Pot|trap steam for a crackling crust|cast iron, stoneware|single unit, kit with lid lifter
*+Bread Bags|keep a baked loaf fresh for days|cotton, waxed-paper|pack of 25, pack of 50
@ Espresso | making espresso at home | 51 mm, 54 mm, 58 mm | portafilters
+Coffee Beans|pull a rich shot with lasting crema|dark-roast, medium-roast, decaf|12 oz bag, 2 lb bag
*Coffee Tamper|press the grounds flat and level|stainless steel, walnut|single unit, kit with mat
*Filter Basket|hold a precise dose of grounds|stainless steel, bottomless|single unit, twin pack
*Dosing Funnel|keep grounds off the counter|aluminum, magnetic|single unit, gift box
*Puck Screen|keep the shower head clean|stainless steel, mesh|single unit, twin pack
*+Group Head Brushes|scrub old coffee oils away|angled, nylon|single unit, pack of 3
+Descaler|remove lime from boilers and lines|citric, liquid|box of 6, 16 oz bottle
# Crafts | Threadmoor, Loomabel, Stitchary, Wickfern, Purlonne | Suits beginners and old hands alike.
@ Quilting | sewing a quilt | crib, twin, queen | quilts
*Quilt Kit|piece a patchwork top from precut fabric|floral, batik, solid-color|boxed kit, kit with pattern
Rotary Cutter|slice several layers of fabric at once|ergonomic, retractable|single unit, kit with blades
+Quilting Thread|sew seams that neither fray nor stretch|cotton, polyester|single spool, set of 12 spools
*Quilt Batting|give a quilt its warmth and loft|cotton, bamboo, wool|single roll, folded pack
*Backing Fabric|cover the back in one seamless piece|cotton, flannel|folded cut, twin pack
*Quilt Binding|finish the edge neatly|cotton, satin|single roll, pack of 2
@ Knitting | knitting a sweater | fingering, worsted, bulky | yarns
*+Knitting Yarn|knit soft, warm garments|merino wool, alpaca, cotton|single skein, pack of 4
*Circular Needles|knit in the round without seams|bamboo, nickel-plated|single pair, set of 3
*Stitch Markers|keep track of rows and repeats|enamel, locking|pack of 20, pack of 50
*Cable Needles|hold stitches aside for a twist|bamboo, aluminum|set of 2, set of 4
Blocking Mats|pin damp knitting to its final shape|foam, gridded|set of 6, set of 9
+Wool Wash|clean hand-knits without felting|lavender, unscented|12 oz bottle, 1 qt bottle
# Pets | Tailwyn, Finnabee, Barkmont, Whiskerlow, Gillmere | Safe for animals.
@ Aquariums | setting up a freshwater aquarium | 10 gal, 20 gal, 40 gal | aquariums
*Fish Tank|give fish a clear, roomy home|glass, rimless|single unit, kit with lid
*Aquarium Filter|keep the water clean and oxygen-rich|hang-on, canister|single unit, kit with media
*Aquarium Heater|hold tropical warmth within a degree|titanium, submersible|single unit, kit with thermometer
Aquarium Gravel|bed plants and hide the tank floor|natural, river-stone|5 lb bag, 20 lb bag
+Water Conditioner|make tap water safe for fish|concentrate, fast-acting|16 oz bottle, 1 gal jug
+Water Test Strips|check nitrate, hardness and pH|six-way, quick-read|pack of 50, pack of 100
+Fish Flakes|feed community fish every day|tropical, color-enhancing|2 oz tub, 7 oz tub
@ Puppies | bringing home a puppy | small-breed, medium-breed, large-breed | dogs
*Dog Crate|give a young dog a den of its own|wire, soft-sided|single unit, kit with divider
*Dog Bed|cushion joints through a long nap|memory-foam, bolster|single unit, kit with spare cover
*+Training Pads|take the mess out of house training|quick-dry, scented|pack of 50, pack of 100
*+Puppy Food|support steady growth in the first year|chicken, salmon, lamb|5 lb bag, 15 lb bag
*Dog Harness|walk a young dog without pulling on the neck|reflective, padded|single unit, set with leash
*Chew Toys|save shoes and furniture from teething|rubber, nylon|single unit, pack of 3
# Cycling | Velmora, Spokehurst, Cranktree, Rovandi, Pedalyn | Check clearances before riding.
@ Drivetrain | replacing a worn drivetrain | 9-speed, 10-speed, 11-speed | drivetrains
*Bicycle Chain|shift crisply and run quietly|nickel-plated, rust-resistant|116-link box, 126-link box
*Cassette|give an even spread of climbing gears|steel, wide-range|single unit, kit with lockring
*Quick Links|open and close a chain by hand|steel, reusable|pack of 2, pack of 6
*Rear Derailleur|move the chain cleanly across the gears|long-cage, clutch|single unit, kit with hanger
+Shift Cables|freshen up sluggish shifting|stainless steel, coated|set of 2, workshop box
+Chain Lube|cut friction and keep rust away|wet-weather, dry-weather|4 oz bottle, 8 oz bottle
+Degreaser|strip old grease from moving parts|citrus, foaming|16 oz bottle, 1 qt bottle
@ Wheels & Tires | going tubeless on a bike | 26 in, 27.5 in, 29 in | wheels
*Bicycle Tire|roll fast and grip loose ground|folding, puncture-resistant|single unit, pair
*Rim Tape|seal spoke holes airtight|woven, tubeless|single roll, pack of 2
Tubeless Valves|hold air at the rim without a tube|brass, aluminum|pair, pack of 4
+Tire Sealant|plug small punctures while riding|latex, ammonia-free|8 oz bottle, 1 qt bottle
*+Inner Tubes|carry a spare for the ride home|butyl, lightweight|pair, pack of 5
Tire Levers|pry a tight bead over the rim|nylon, steel-core|pair, set of 3
"""
SERIES = ("Classic", "Pro", "Select", "Everyday", "Heritage", "Prime", "Origin", "Summit")
TITLES = ("{brand} {Fit} {Variant} {name}, {pack}", "{brand} {series} {name} {Fit}, {Variant}, {pack}",
          "{brand} {Variant} {name} {Fit} ({pack})", "{brand} {name} {Fit} - {Variant}, {pack}, No. {model}")
PURPOSE = ("Made to {purpose}.", "The {brand} {series} {low} will {purpose}.",
           "A proven way to {purpose}, from {brand}.", "Designed by {brand} to {purpose}.",
           "{brand} built this {series} product to {purpose}.")
DETAIL = ("This is the {variant} version, sold as {a_pack}.", "Sold as {a_pack}, in the {variant} version.",
          "Comes as {a_pack}; this listing is for the {variant} version.")
FITTING = ("Suits {fit} {noun}.", "Part of the {brand} {fit} line for {noun}.",
           "The right choice for {fit} {noun}.", "For {fit} {noun}; check yours before ordering.")
PROJECT = ("Customers {doing} often have this in the cart.", "Belongs on the shopping list when {doing}.",
           "Intended for anyone {doing}.", "One of the things you need when {doing}.")


@dataclass
class Project:
    section: str
    doing: str
    fits: list[str]
    noun: str
    department: str
    tip: str
    axis: int  # of this project's fit in the department's loyalty table; axis 0 is the brand
    types: list[int] = field(default_factory=list)


@dataclass
class Type:
    name: str
    purpose: str
    variants: list[str]
    packs: list[str]
    project: int  # its home: where it is listed with all its fields
    has_fit: bool
    consumable: bool
    items: list[int] = field(default_factory=list)


# ---- The catalogue --------------------------------------------------------------------------------


def parse_shop() -> tuple[dict[str, list[str]], list[Project], list[Type]]:
    """Read SHOP into brands per department, projects and types."""
    brands, projects, types, shared = {}, [], [], []
    for line in SHOP.strip().splitlines():
        fields = [part.strip() for part in line.lstrip("#@=*+ ").split("|")]
        if line[0] == "#":
            department, tip = fields[0], fields[2]
            brands[department] = fields[1].split(", ")
        elif line[0] == "@":
            axis = 1 + sum(p.department == department for p in projects)
            projects.append(Project(*fields[:2], fields[2].split(", "), fields[3], department, tip, axis))
        elif line[0] == "=":  # resolved below: the type may be listed further down
            shared.append((projects[-1], len(projects[-1].types), fields[0]))
        else:
            flags = line[:2]
            projects[-1].types.append(len(types))
            types.append(Type(*fields[:2], fields[2].split(", "), fields[3].split(", "), len(projects) - 1,
                              "*" in flags, "+" in flags))
    for project, place, name in shared:
        project.types.insert(place, [t.name for t in types].index(name))
    return brands, projects, types


def pick(rng: random.Random, weights: np.ndarray | list) -> int:
    """Draw an index with probability proportional to its weight."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def shuffled(rng: random.Random, values: list) -> list:
    """Shuffle by random() alone, the one method whose sequence Python promises to keep."""
    return [value for _, _, value in sorted((rng.random(), n, value) for n, value in enumerate(values))]


def write_item(rng: random.Random, brand: str, kind: Type, fit: str, variant: str, pack: str,
               project: Project) -> dict[str, str]:
    """Fill title and description frames with the item's attributes."""

    def choose(frames: tuple[str, ...]) -> str:
        return frames[pick(rng, np.ones(len(frames)))]

    words = dict(
        brand=brand, series=choose(SERIES), name=kind.name, fit=fit, noun=project.noun, variant=variant,
        pack=pack, purpose=kind.purpose, doing=project.doing,
        Fit=fit if any(c.isdigit() for c in fit) else fit.capitalize(),  # 1/2 in, M6, 18V; but Pine
        model=f"{brand[:2].upper()}-{100 + int(rng.random() * 900)}",
        Variant=" ".join(w[0].upper() + w[1:] for w in variant.split()),
        low=" ".join(w if w.isupper() else w.lower() for w in kind.name.split()),
        a_pack=("an " if pack.startswith("8 ") else "a ") + pack)
    frames = [choose(PURPOSE), choose(DETAIL)]
    frames += [choose(FITTING)] if fit else []
    frames += [choose(PROJECT)] if rng.random() < 0.8 else []
    frames += [project.tip] if len(frames) < 4 and rng.random() < 0.4 else []
    title = " ".join(choose(TITLES).format(**words).replace(" ,", ",").split())
    return {"title": title, "description": " ".join(frames).format(**words), "brand": brand,
            "categories": f"{project.department} > {project.section} > {kind.name}"}


def build_items(rng: random.Random, brands: dict, projects: list[Project],
                types: list[Type]) -> tuple[list[dict], np.ndarray]:
    """Make the items: their JSON fields, and (N, 5) columns type, brand, fit (-1 none), weight, arrival."""
    arriving = set(shuffled(rng, list(range(len(types))))[:NUM_ARRIVALS])
    rows = []
    for t, kind in enumerate(types):
        project = projects[kind.project]
        names, fits = brands[project.department], project.fits if kind.has_fit else [""]
        grid = shuffled(rng, [(b, f) for b in range(len(names)) for f in range(len(fits))])
        looks = shuffled(rng, [(v, p) for v in kind.variants for p in kind.packs])
        count = PER_TYPE + pick(rng, [1, 1, 1]) - 1
        for rank in range(count + (t in arriving)):
            # 5 or 15 in the grid, 4 or 6 looks: no two items of a type agree in both before rank 20
            (b, f), (variant, pack) = grid[rank % len(grid)], looks[rank % len(looks)]
            text = write_item(rng, names[b], kind, fits[f], variant, pack, project)
            arrival = rank == count
            weight = ARRIVAL if arrival else (1 + rank) ** -ZIPF
            rows.append((text, (t, b, f if kind.has_fit else -1, weight, arrival)))
    rows = shuffled(rng, rows)  # item ids tell nothing
    for i, (_, attributes) in enumerate(rows):
        types[attributes[0]].items.append(i)
    items = [{"item_id": i + 1, **text} for i, (text, _) in enumerate(rows)]
    return items, np.array([attributes for _, attributes in rows])


# ---- The process, for the simulation and the oracle alike -----------------------------------------


class Process:
    """P projects, T types, N items; items is (N, 5): type, brand, fit, weight, arrival."""

    def __init__(self, rng: random.Random, brands: dict, projects: list[Project], types: list[Type],
                 items: np.ndarray):
        self.projects, self.types = projects, types
        P, T = len(projects), len(types)
        self.start = np.array(shuffled(rng, [(1 + n) ** -0.4 for n in range(P)]))
        self.start /= self.start.sum()
        self.type_popularity = np.array(shuffled(rng, [(1 + n) ** -0.7 for n in range(T)]))
        self.type_popularity /= self.type_popularity.sum()
        same = np.array([[p.department == q.department for q in projects] for p in projects])
        near, far = same & ~np.eye(P, dtype=bool), np.tile(self.start, (P, 1)) * ~np.eye(P, dtype=bool)
        self.elsewhere = (near / near.sum(1, keepdims=True) + far / far.sum(1, keepdims=True)) / 2  # (P, P)
        self.prior = {}  # department -> P(brand, fit of each project); the last index means none
        for department, names in brands.items():
            sizes = [len(names)] + [len(p.fits) for p in projects if p.department == department]
            table = np.ones(())
            for n in sizes:
                taste = (1 + np.arange(n)) ** -0.3
                taste = np.append(taste / taste.sum() * (1 - NO_LOYALTY), NO_LOYALTY)
                table = np.multiply.outer(table, taste)
            self.prior[department] = table
        self.choice = [[self.choice_table(items, t, brands, new) for t in range(T)] for new in (False, True)]

    def choice_table(self, items: np.ndarray, t: int, brands: dict, arrivals: bool) -> np.ndarray:
        """P(item | type t, loyal brand, loyal fit), (brands + 1, fits + 1, items of the type)."""
        project, rows = self.projects[self.types[t].project], items[self.types[t].items]
        brand = np.arange(len(brands[project.department]) + 1)[:, None, None] == rows[:, 1]
        fit = np.arange(len(project.fits) + 1)[:, None] == rows[:, 2]
        weight = rows[:, 3] * (arrivals | (rows[:, 4] == 0)) * BRAND ** brand * FIT ** fit
        return weight / weight.sum(-1, keepdims=True)

    def switching(self, history: list[int]) -> np.ndarray:
        """P(next project | project), (P, P), after the types bought so far."""
        done = [set(p.types) <= set(history) for p in self.projects]
        leave = np.where(done, DONE_SWITCH, SWITCH)[:, None]
        return np.eye(len(done)) * (1 - leave) + leave * self.elsewhere

    def next_type(self, history: list[int]) -> np.ndarray:
        """P(type | project, types bought so far), (P, T)."""
        step = np.zeros((len(self.projects), len(self.types)))
        for p, project in enumerate(self.projects):
            latest = next((project.types.index(t) for t in reversed(history) if t in project.types), -1)
            for place, t in enumerate(project.types):
                if t in history:
                    step[p, t] = AGAIN
                elif place > latest:
                    step[p, t] = SKIP ** (place - latest - 1)
                else:
                    step[p, t] = BACK
        step /= step.sum(1, keepdims=True)
        again = np.zeros(len(self.types))
        for age, t in enumerate(reversed(history)):
            again[t] += self.types[t].consumable * 0.7 ** age
        rebuy = REBUY if again.any() else 0
        return NOISE * self.type_popularity + (1 - NOISE) * (
            (1 - rebuy) * step + rebuy * again / max(again.sum(), 1e-9))

    def bought_before(self, t: int, bought: list[int]) -> int | None:
        """The item of a consumable type that the user bought last, or None."""
        if not self.types[t].consumable:
            return None
        return next((i for i in reversed(bought) if i in self.types[t].items), None)

    def choose(self, t: int, table: np.ndarray, bought: list[int], last: bool) -> np.ndarray:
        """P(item | type), (items of the type,), given the department's table over loyalties."""
        axis = self.projects[self.types[t].project].axis
        belief = table.sum(tuple(a for a in range(1, table.ndim) if a != axis))  # (brand, fit)
        p = np.einsum("bf,bfn->n", belief, self.choice[last][t])
        before = self.bought_before(t, bought)
        return p if before is None else (1 - SAME) * p + SAME * (np.array(self.types[t].items) == before)

    def learn(self, t: int, i: int, table: np.ndarray, bought: list[int]) -> np.ndarray:
        """Bayes: the department's table over loyalties after item i of type t."""
        project = self.projects[self.types[t].project]
        likelihood = self.choice[False][t][:, :, self.types[t].items.index(i)]
        before = self.bought_before(t, bought)
        if before is not None:
            likelihood = (1 - SAME) * likelihood + SAME * (before == i)
        shape = [1] * table.ndim
        shape[0], shape[project.axis] = likelihood.shape
        table = table * likelihood.reshape(shape)
        return table / table.sum()

    def simulate(self, rng: random.Random) -> tuple[list[int], np.ndarray]:
        """One user's purchases, and the oracle's probabilities (N,) for the last one before seeing it."""
        project = pick(rng, self.start)
        truth, tables = {}, dict(self.prior)  # per department: the loyalties one-hot; what one can know
        for department, prior in self.prior.items():
            hot = np.zeros(prior.size)
            hot[pick(rng, prior.ravel())] = 1
            truth[department] = hot.reshape(prior.shape)
        length = MIN_LENGTH
        while length < MAX_LENGTH and rng.random() < MORE:
            length += 1
        belief, history, bought = self.start, [], []
        for n in range(length):
            if n:
                switching = self.switching(history)
                project, belief = pick(rng, switching[project]), belief @ switching
            next_type, last = self.next_type(history), n == length - 1
            if last:
                oracle = np.zeros(sum(len(t.items) for t in self.types))
                for t, probability in enumerate(belief @ next_type):
                    table = tables[self.projects[self.types[t].project].department]
                    oracle[self.types[t].items] = probability * self.choose(t, table, bought, last)
            t = pick(rng, next_type[project])
            department = self.projects[self.types[t].project].department
            i = self.types[t].items[pick(rng, self.choose(t, truth[department], bought, last))]
            if not last:
                belief = belief * next_type[:, t] / (belief @ next_type[:, t])
                tables[department] = self.learn(t, i, tables[department], bought)
            history.append(t)
            bought.append(i)
        return bought, oracle


# ---- Files and figures ----------------------------------------------------------------------------


def timestamps(rng: random.Random, length: int) -> list[int]:
    """Increasing seconds; the last purchase, and only that, falls in the final quarter."""
    def draw(low: int, high: int) -> int:
        return low + int(rng.random() * (high - low))
    times = [draw(FIRST_DAY, LAST_QUARTER) for _ in range(length - 1)]
    return sorted(times) + [draw(LAST_QUARTER, END)]


def summarise(users: list[list[int]], oracle: np.ndarray, items: np.ndarray) -> None:
    """Print the size and shape of the data, and HR and NDCG of three rankings on the users' last items.

    oracle: its probabilities for each user's last purchase, (users, N). items: columns as in build_items.
    """
    num_items, targets = len(items), np.array([user[-1] for user in users])
    popularity, follows = np.zeros(num_items), np.zeros((num_items, num_items))
    for user in users:
        np.add.at(popularity, user[:-2], 1)
        np.add.at(follows, (user[:-3], user[1:-2]), 1)
    total = sum(len(user) for user in users)
    repeats = sum(len(user) - len(set(user)) for user in users)
    new_targets = targets[items[targets, 4] > 0]
    share = np.sort(popularity)[::-1] / popularity.sum()
    gini = 1 - 2 * (np.cumsum(share[::-1]).mean() - 0.5 / num_items)
    print(f"items {num_items} | users {len(users)} | interactions {total} | repeats {repeats / total:.3f} | "
          f"cold test targets {len(new_targets)} ({len(new_targets) / len(users):.3f}) on "
          f"{len(set(new_targets))} of {NUM_ARRIVALS} arrivals | "
          f"top 1 % share {share[:num_items // 100].sum():.3f} | Gini {gini:.3f}")

    last_in_training = [user[-2] for user in users]
    rankings = {"oracle": oracle, "bigram": follows[last_in_training] + popularity / 1e6,
                "popularity": np.tile(popularity, (len(users), 1))}
    print(f"{'':12}" + "".join(f"{f'HR@{k}':>9}{f'NDCG@{k}':>9}" for k in (3, 5, 10)))
    for name, scores in rankings.items():
        order = np.argsort(-scores, axis=1, kind="stable")      # ties by item id
        ranks = np.argmax(order == targets[:, None], axis=1)    # from 0
        gains = 1 / np.log2(ranks + 2)
        figures = ""
        for k in (3, 5, 10):
            figures += f"{(ranks < k).mean():9.4f}{(gains * (ranks < k)).mean():9.4f}"
        print(f"{name:12}{figures}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    return parser.parse_args(argv)


def main() -> None:
    out = parse_args().out
    rng = random.Random(SEED)
    brands, projects, types = parse_shop()
    items, columns = build_items(rng, brands, projects, types)
    process = Process(rng, brands, projects, types, columns)
    users, oracle = zip(*(process.simulate(rng) for _ in range(NUM_USERS)))
    rows = []
    for number, user in enumerate(users, 1):
        rows.append({"user_id": f"u{number:04d}", "items": [i + 1 for i in user],
                     "timestamps": timestamps(rng, len(user))})
    write_jsonl(out / "items.jsonl", items)
    write_jsonl(out / "interactions.jsonl", rows)
    summarise(users, np.array(oracle), columns)
    print(f"wrote {out / 'items.jsonl'} and {out / 'interactions.jsonl'}")


if __name__ == "__main__":
    main()
