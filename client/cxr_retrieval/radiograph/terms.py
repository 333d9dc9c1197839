"""Terms and codes of the DICOM standard that tell what a film shows, and what people write in their place."""

from __future__ import annotations

import re
from typing import Final

from pydicom import uid

from cxr_retrieval.radiograph.elements import words

PROJECTION_MODALITIES: Final = frozenset({"CR", "DX", "RG", "XA", "RF", "OT", "SC", ""})
OTHER_MODALITIES: Final = frozenset(
    words(
        "AR ASMT AU BDUS BI BMD CD CF CFM CP CS CT CTPROTOCOL DD DF DG DM DMS DOC DS EC ECG EEG EMG EOG EPS ES FA FID FS GM HC HD IO "
        "IOL IVOCT IVUS KER KO LEN LP LS MA MG MR MS NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS PA PLAN POS PR PT PX REG RESP RTDOSE "
        "RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT SEG SM SMR SR SRF ST STAIN TEXTUREMAP TG US VA VF XAPROTOCOL XC"
    )
)
"""Defined terms of Modality (PS3.3 C.7.3.1.1.1)."""
FOR_PROCESSING: Final = "1.2.840.10008.5.1.4.1.1.1.1.1"
PROJECTION_CLASSES: Final = frozenset(
    {
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
        uid.XRayAngiographicImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.EnhancedXAImageStorage,
        uid.EnhancedXRFImageStorage,
    }
)
"""Of the storage classes that PS3.4 B.5 has; those that it has not, private ones, are judged by their other elements."""

OTHER_PARTS: Final = frozenset(
    words(
        "ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS ARM BACK BLADDER BRAIN BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK "
        "CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FEMUR FIBULA "
        "FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER "
        "LSPINE LSSPINE MANDIBLE MAXILLA MOUTH NECK NOSE ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHANTOM PHARYNX PROSTATE "
        "RECTUM SCALP SCAPULA SCLERA SCROTUM SELLA SHOULDER SIJOINT SINUS SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR "
        "TESTIS THIGH THUMB THYROID TIBIA TLSPINE TMJ TOE TONGUE TSPINE URETER URETHRA UTERUS VAGINA VULVA WRIST ZYGOMA"
    )
)
"""Defined terms of Body Part Examined (PS3.16 Annex L) whose films show no two lungs."""
DOUBTFUL_PARTS: Final = frozenset(words("AORTA AXILLA BODY BREAST BRONCHUS FACE HEART MEDIASTINUM RIB RIBS THYMUS TRACHEA WHOLEBODY"))
"""Terms under which chest films are found, too: FACE is French for a frontal view, BREAST a translation of "Brust"."""
CHEST: Final = re.compile(
    r"CHEST|THORA(?!C\w*\W*(LUMBAR\W*)?SPINE)|T.{1,2}RAX|TORA[XKC]|LUNG|PULM|CXR|BABYGRAM|POUMON|BRUST|PE(CT|CH)O|PETTO|POLMON|BORST|BRYST|BRÖST|KLATKA|HRUDN|ГРУД|ЛЕГК|ЛЁГК|胸|肺|흉|폐"
)
"""Beginnings of words for the chest or the lungs: English, Latin, German, French, Spanish, Portuguese, Italian, Dutch, Danish,
Swedish, Polish, Czech, Turkish, Russian, Chinese and Japanese, Korean; and `T?RAX`, as an accent that got lost is written."""
_REGIONS: Final = (
    ("abdomen", "818981001", ""),
    ("abdomen and pelvis", "818982008", ""),
    ("abdomen, as coded until 2019", "113345001", "T-D4000"),
    ("acromioclavicular joint", "85856004", "T-15420"),
    ("ankle joint", "70258002", "T-15750"),
    ("anus", "53505006", "T-59900"),
    ("bile duct", "28273000", "T-60610"),
    ("biliary tract", "34707002", "T-60600"),
    ("bladder", "89837001", "T-74000"),
    ("bone of lower limb", "72001000", "T-12700"),
    ("bone of upper limb", "371195002", "T-D0821"),
    ("calcaneus", "80144004", "T-12770"),
    ("cervical spine", "122494005", "T-11501"),
    ("cervico thoracic spine", "1217257000", ""),
    ("clavicle", "51299004", "T-12310"),
    ("coccyx", "64688005", "T-11BF0"),
    ("colon", "71854001", "T-59300"),
    ("common bile duct", "79741001", "T-64500"),
    ("duodenum", "38848004", "T-58200"),
    ("elbow joint", "16953009", "T-15430"),
    ("esophagus", "32849002", "T-56000"),
    ("esophagus stomach and duodenum", "110861005", "T-DD163"),
    ("extremity", "66019005", "T-D0300"),
    ("eye", "81745001", "T-AA000"),
    ("eye region", "371398005", "T-D0801"),
    ("facial bones", "91397008", "T-11196"),
    ("femur", "71341001", "T-12710"),
    ("fibula", "87342007", "T-12750"),
    ("finger", "7569003", "T-D8800"),
    ("foot", "56459004", "T-D9700"),
    ("forearm", "14975008", "T-D8500"),
    ("gallbladder", "28231008", "T-63000"),
    ("hand", "85562004", "T-D8700"),
    ("head", "69536005", "T-D1100"),
    ("head and neck", "774007", "T-D1000"),
    ("hip", "29836001", "T-D2500"),
    ("hip joint", "24136001", "T-15710"),
    ("humerus", "85050009", "T-12410"),
    ("ileum", "34516001", "T-58600"),
    ("ilium", "22356005", "T-12340"),
    ("internal auditory canal", "361078006", "T-AB959"),
    ("jaw region", "661005", "T-D1213"),
    ("jejunum", "21306003", "T-58400"),
    ("knee", "72696002", "T-D9200"),
    ("large intestine", "14742008", "T-59000"),
    ("larynx", "4596009", "T-24100"),
    ("liver and biliary structure", "303270005", "T-50007"),
    ("lower leg", "30021000", "T-D9400"),
    ("lower limb", "61685007", "T-D9000"),
    ("lumbar spine", "122496007", "T-11503"),
    ("lumbo sacral spine", "1217253001", ""),
    ("mandible", "91609006", "T-11180"),
    ("mastoid bone", "59066005", "T-11133"),
    ("maxilla", "70925003", "T-11170"),
    ("muscle of lower limb", "102292000", "T-14668"),
    ("muscle of upper limb", "30608006", "T-13600"),
    ("nasal bone", "74386004", "T-11149"),
    ("neck", "45048000", "T-D1600"),
    ("optic canal", "55024004", "T-11102"),
    ("orbital structure", "363654007", "T-D14AE"),
    ("pancreas", "15776009", "T-65000"),
    ("pancreatic duct", "69930009", "T-65010"),
    ("pancreatic duct and bile duct systems", "110621006", "T-65600"),
    ("paranasal sinus", "2095001", "T-22000"),
    ("parotid gland", "45289007", "T-61100"),
    ("patella", "64234005", "T-12730"),
    ("pelvis", "816092008", ""),
    ("pelvis and lower extremities", "1231522001", ""),
    ("pelvis, as coded until 2019", "12921003", "T-D6000"),
    ("phantom", "706342009", "R-FE0C7"),
    ("prostate", "41216001", "T-92000"),
    ("rectum", "34402009", "T-59600"),
    ("sacro coccygeal spine", "1217254007", ""),
    ("sacroiliac joint", "39723000", "T-15680"),
    ("sacrum", "54735007", "T-11AD0"),
    ("scapula", "79601000", "T-12280"),
    ("sella turcica", "42575006", "T-D1460"),
    ("sesamoid bones of foot", "58742003", "T-12980"),
    ("shoulder", "16982005", "T-D2220"),
    ("skull", "89546000", "T-11100"),
    ("small intestine", "30315005", "T-58000"),
    ("spine", "421060004", "T-D04FF"),
    ("sternoclavicular joint", "7844006", "T-15610"),
    ("sternum", "56873002", "T-11210"),
    ("stomach", "69695003", "T-57000"),
    ("submandibular gland", "54019009", "T-61300"),
    ("tarsal joint", "27949001", "T-15770"),
    ("temporomandibular joint", "53620006", "T-15290"),
    ("thigh", "68367000", "T-D9100"),
    ("thoracic spine", "122495006", "T-11502"),
    ("thoraco lumbar spine", "1217256009", ""),
    ("thumb", "76505004", "T-D8810"),
    ("toe", "29707007", "T-D9800"),
    ("upper arm", "40983000", "T-D8200"),
    ("upper limb", "53120007", "T-D8000"),
    ("upper urinary tract", "431491007", "T-7000B"),
    ("ureter", "87953007", "T-73000"),
    ("urethra", "13648007", "T-75000"),
    ("uterus and fallopian tubes", "110639002", "T-88920"),
    ("vertebral column and cranium", "110517009", "T-11011"),
    ("wrist joint", "74670003", "T-15460"),
    ("zygoma", "13881006", "T-11166"),
)
OTHER_REGIONS: Final = {(scheme, code): name for name, sct, srt in _REGIONS for scheme, code in (("SCT", sct), ("SRT", srt)) if code}
"""PS3.16 CID 4009 "DX Anatomy Imaged" without what shows the lungs, in SNOMED CT and in the older SNOMED-RT codes of the same concepts."""
CHEST_REGIONS: Final = frozenset(
    {
        ("SCT", "816094009"),  # chest
        ("SCT", "51185008"),  # thoracic structure, as coded until 2019
        ("SCT", "43799004"),  # thoracic cavity
        ("SCT", "39607008"),  # lung
        ("SCT", "416550000"),  # chest and abdomen
        ("SCT", "416775004"),  # chest, abdomen and pelvis
        ("SRT", "T-D3000"),
        ("SRT", "T-28000"),
        ("SRT", "R-FAB55"),
        ("SRT", "R-FAB56"),
    }
)
OTHER_VIEW_CODES: Final = frozenset(
    {
        ("SCT", "399067008"),  # lateral
        ("SCT", "399173006"),  # left lateral
        ("SCT", "399198007"),  # right lateral
        ("SCT", "399352003"),  # lateral-medial
        ("SCT", "399260004"),  # medial-lateral
        ("SCT", "30730003"),  # sagittal
        ("SCT", "399182000"),  # oblique
        ("SCT", "399184004"),  # left oblique
        ("SCT", "399236003"),  # right oblique
        ("SCT", "399135007"),  # left anterior oblique
        ("SCT", "399356000"),  # right anterior oblique
        ("SCT", "399006002"),  # left posterior oblique
        ("SCT", "399038007"),  # right posterior oblique
        ("SRT", "R-102CD"),
        ("SRT", "R-10236"),
        ("SRT", "R-10232"),
        ("SRT", "R-10228"),
        ("SRT", "R-10224"),
        ("SRT", "G-A145"),
        ("SRT", "R-102C1"),
        ("SRT", "R-10238"),
        ("SRT", "R-10234"),
        ("SRT", "R-10220"),
        ("SRT", "R-40985"),
        ("SRT", "R-10212"),
        ("SRT", "R-10210"),
    }
)
"""PS3.16 CID 4010 "DX View", in SNOMED CT and in the older SNOMED-RT codes of the same concepts, which SNM3 named, too."""
DESCRIPTIONS: Final = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription")
FRONTAL_WORDS: Final = frozenset(
    {"PA", "AP", "FRONTAL", "FRONTALE", "DV", "VD", "FACE", "FRENTE", "POSTEROANTERIOR", "ANTEROPOSTERIOR", "POSTERO", "ANTERO"}
)
LATERAL_WORDS: Final = frozenset(
    {"LAT", "LLAT", "RLAT", "LATL", "LATR", "LATERAL", "LATERALE", "LATÉRAL", "LATÉRALE", "LATERO", "LATEROLATERAL", "LATEROLATERALE"}
    | {"SEITL", "SEITLICH", "PROFIL", "PERFIL"}
)
LATERAL_VIEWS: Final = LATERAL_WORDS | {"LL", "RL"}
TURNED_VIEWS: Final = frozenset(
    {"LLD", "RLD", "DECUB", "DECUBITUS", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBL", "OBLIQUE"}  # even where PA or AP stands beside
)
"""What scanners and people write, in capitals. LL and RL mean a view only in View Position, whose defined terms they are (C.8.7.1)."""
